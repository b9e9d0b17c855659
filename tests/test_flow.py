"""flow.py: its convention, schedules, samplers against diffusers, and painting batches of pictures."""

import copy

import pytest
import torch
from diffusers import UniPCMultistepScheduler

import dit as dit_module
from checkpoint import InputError
from dit import DiT, DiTConfig, pack_images, patchify, unpatchify
from flow import SAMPLERS, denoise, interpolate, karras_schedule, sample_flow, shift_schedule, train_times, velocity_target

# Cosmos-Predict2.5 post-trained, 36 evaluations, as its scheduler prints them.
KARRAS_36 = """
0.99502 0.99421 0.99323 0.99207 0.99067 0.98898 0.98694 0.98447 0.98145 0.97775 0.9732 0.96759 0.96064
0.952 0.94122 0.92776 0.91093 0.88989 0.86365 0.83112 0.79112 0.74262 0.68494 0.61812 0.5433 0.46294
0.38079 0.30133 0.22887 0.16665 0.1163 0.07777 0.04982 0.03052 0.01784 0.0099 0
"""


# --------------------------------------------------------------------------------------------- convention and schedules


def test_the_flow_runs_from_data_at_0_to_noise_at_1():
    x0, noise = torch.randn(2, 5, 3)
    assert torch.equal(interpolate(x0, noise, torch.tensor(0.0)), x0)
    assert torch.equal(interpolate(x0, noise, torch.tensor(1.0)), noise)
    t, dt, v = torch.rand(5, 1), 1e-2, velocity_target(x0, noise)
    x = interpolate(x0, noise, t)
    assert torch.allclose(interpolate(x0, noise, t + dt), x + dt * v, atol=1e-6)
    assert torch.allclose(x - t * v, x0, atol=1e-6)


@pytest.mark.parametrize("method", ["euler", "unipc"])
@pytest.mark.parametrize("sigmas", [torch.tensor([0.9, 0.0]), shift_schedule(7), karras_schedule(5)], ids=["one", "7", "5"])
def test_the_true_velocity_leads_to_the_data_in_any_number_of_steps(method, sigmas):
    x0, noise = torch.randn(2, 6, 4)
    x = interpolate(x0, noise, sigmas[0])
    assert torch.allclose(sample_flow(lambda x, t: velocity_target(x0, noise), x, sigmas, method), x0, atol=1e-5)


def test_schedules_are_those_of_cosmos():
    karras = karras_schedule(36)
    assert torch.allclose(karras, torch.tensor([float(s) for s in KARRAS_36.split()]), atol=6e-6)
    shifted = shift_schedule(35, 5.0)
    assert shifted.shape == (36,) and shifted[-1] == 0 and shifted.dtype == karras.dtype == torch.float32
    expected = torch.tensor([0.9998, 0.99395, 0.98782, 0.31891, 0.23237, 0.12809])
    assert torch.allclose(shifted[[0, 1, 2, -4, -3, -2]], expected, atol=6e-6)
    assert torch.allclose(shift_schedule(4, 1.0), torch.linspace(0.999, 0, 5))


def test_training_times_are_logit_normal_and_shifted():
    t = train_times(40_000, 5.0, torch.Generator().manual_seed(0))
    assert t.shape == (40_000,) and t.min() > 0 and t.max() < 1
    u = t / (5 - 4 * t)  # undo the shift
    z = torch.log(u / (1 - u))
    assert z.mean().abs() < 0.02 and (z.std() - 1).abs() < 0.02
    assert t.median().item() == pytest.approx(5 / 6, abs=0.005)
    assert torch.equal(t, train_times(40_000, 5.0, torch.Generator().manual_seed(0)))
    assert train_times(40_000, 1.0, torch.Generator().manual_seed(0)).median().item() == pytest.approx(0.5, abs=0.01)


# --------------------------------------------------------------------------------------------------------------- samplers


def smooth_velocity():
    """A velocity field that bends: every term of the solver counts."""
    mix = torch.randn(8, 8) / 8**0.5
    return lambda x, t: torch.tanh(x @ mix) * (0.5 + t) + 0.2 * x


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 36])
def test_unipc_follows_diffusers_step_by_step(steps):
    """The published scheduler config, except that its step index is counted instead of looked up in rounded times."""
    scheduler = UniPCMultistepScheduler(
        solver_order=2, solver_type="bh2", predict_x0=True, lower_order_final=True, prediction_type="flow_prediction",
        use_flow_sigmas=True, use_karras_sigmas=True, sigma_min=0.01, sigma_max=200.0, final_sigmas_type="zero",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    sigmas = karras_schedule(steps)
    assert torch.allclose(scheduler.sigmas, sigmas, atol=1e-7)
    velocity, x = smooth_velocity(), torch.randn(3, 8)
    seen, theirs = [], x
    sample_flow(lambda x, t: (seen.append(x), velocity(x, t))[1], x, sigmas, "unipc", None)
    ours = [*seen[1:], sample_flow(velocity, x, sigmas, "unipc")]
    scheduler._step_index = 0
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(velocity(theirs, sigmas[i].item()), t, theirs).prev_sample
        assert (theirs - ours[i]).abs().max() <= 1e-6 * max(1, x.abs().max()), f"step {i}"


def test_more_steps_come_closer_and_unipc_faster_than_euler():
    velocity, x = smooth_velocity(), torch.randn(3, 8)
    truth = sample_flow(velocity, x, shift_schedule(3000, 1.0), "euler")

    def error(method, steps):
        return (sample_flow(velocity, x, shift_schedule(steps, 1.0), method) - truth).abs().max()

    assert error("euler", 40) < error("euler", 10) / 3
    assert error("unipc", 10) < error("euler", 10) / 5


def test_progress_is_told_after_each_step_and_the_state_is_fp32():
    told, types = [], set()

    def velocity(x, t):
        types.add((x.dtype, type(t)))
        return x.bfloat16()

    x = sample_flow(velocity, torch.randn(2, 2).bfloat16(), shift_schedule(3), "unipc", lambda i, n: told.append((i, n)))
    assert told == [(1, 3), (2, 3), (3, 3)] and types == {(torch.float32, float)} and x.dtype == torch.float32


@pytest.mark.parametrize("sigmas", [[0.0], [0.5, 0.1], [0.5, 0.5, 0.0], [0.2, 0.5, 0.0], [1.0, 0.0]])
def test_a_schedule_that_does_not_fall_to_0_is_refused(sigmas):
    with pytest.raises(InputError, match="falls from below 1 to 0"):
        sample_flow(lambda x, t: x, torch.zeros(1), torch.tensor(sigmas))


def test_an_unknown_sampler_is_refused():
    with pytest.raises(InputError, match="no sampler 'heun'; there are unipc, euler, ancestral"):
        sample_flow(lambda x, t: x, torch.zeros(1), shift_schedule(2), "heun")


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_fresh_noise_keeps_the_distribution(eta):
    """Data of a known mean and spread, whose true velocity is known too: the samples have both, whatever noise is renewed."""
    mean, std = 0.7, 0.4

    def velocity(x, t):
        share = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
        return (x - mean - share * (x - (1 - t) * mean)) / t

    noise = lambda: torch.randn(20_000)  # noqa: E731
    x = sample_flow(velocity, noise(), shift_schedule(200, 3.0), "ancestral", None, eta, noise)
    assert x.mean().item() == pytest.approx(mean, abs=0.02) and x.std().item() == pytest.approx(std, abs=0.02)


def test_renewed_noise_is_new_noise():
    """At eta 1 what is left of the start is what the ancestral sampler leaves; far above, every step starts anew."""
    start, sigmas, drawn = torch.randn(50_000), torch.tensor([0.8, 0.5, 0.0]), []
    seen = []

    def velocity(x, t):
        seen.append(x)
        return start / 0.8 if t > 0.5 else x                                           # the data is 0, start all noise

    for eta, kept in ((1.0, 0.25), (100.0, 0.0)):
        seen.clear(), drawn.clear()
        noise = lambda: drawn.append(torch.randn(50_000)) or drawn[-1]  # noqa: E731
        sample_flow(velocity, start, sigmas, "ancestral", None, eta, noise)
        assert len(drawn) == 1                                                         # none behind the last step
        expected = 0.5 * (kept * start / 0.8 + (1 - kept**2) ** 0.5 * drawn[0])
        assert torch.allclose(seen[1], expected, atol=1e-5)


def test_without_fresh_noise_it_is_euler():
    x, sigmas, velocity = torch.randn(50), shift_schedule(5), lambda x, t: x.sin() + t
    euler = sample_flow(velocity, x, sigmas, "euler")
    assert torch.equal(sample_flow(velocity, x, sigmas, "ancestral", None, 0.0, lambda: torch.randn(50)), euler)


# ---------------------------------------------------------------------------------------------------------------- denoise


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(1)
    dit = DiT.from_config(DiTConfig(2, 2, 32, adaln_lora_dim=8, text_embed_dim=24, crossattn_proj_in_channels=40))
    with torch.no_grad():
        for p in dit.parameters():
            if p.ndim == 2:
                p.normal_(0, p.shape[1] ** -0.5)
    return dit


def batch():
    """Two clean images, none, one; all sizes differ; contexts of different lengths."""
    conditions = [[torch.randn(16, 4, 6), torch.randn(16, 2, 2)], [], [torch.randn(16, 6, 4)]]
    positive = [torch.randn(n, 24) for n in (7, 3, 11)]
    return conditions, [(4, 4), (6, 2), (2, 10)], positive, [p[: n + 1] for n, p in enumerate(positive)], [5, 6, 7]


@pytest.mark.parametrize("method", SAMPLERS)
def test_a_picture_is_the_same_alone_and_in_a_batch(dit, method):
    everything = batch()
    options = {"sigmas": shift_schedule(4), "guidance": 3.0, "method": method}
    together = denoise(dit, *everything, **options)
    assert [tuple(z.shape) for z in together] == [(16, 4, 4), (16, 6, 2), (16, 2, 10)]
    for s in range(3):
        (alone,) = denoise(dit, *(part[s : s + 1] for part in everything), **options)
        assert (alone - together[s]).abs().max() < 5e-5
    order = [2, 0, 1]
    shuffled = denoise(dit, *([part[s] for s in order] for part in everything), **options)
    assert all((z - together[s]).abs().max() < 5e-5 for z, s in zip(shuffled, order, strict=True))


@pytest.mark.parametrize("condition_time", [1e-4, None])
def test_denoise_is_guided_euler_on_the_whole_forward(dit, condition_time):
    """Against a plain loop: one branch after the other, nothing computed beforehand, clean images put back every step."""
    conditions, sizes, positive, negative, seeds = (part[:1] for part in batch())
    sigmas, guidance = shift_schedule(3), 2.5
    pack = pack_images([[(2, 3), (1, 1), (2, 2)]])
    clean = torch.cat([patchify(z) for z in conditions[0]])
    given = torch.tensor([True, True, False])
    x = patchify(torch.randn(16, 4, 4, generator=torch.Generator().manual_seed(5)))
    with torch.no_grad():
        for t, after in zip(sigmas[:-1], sigmas[1:], strict=True):
            times = torch.where(given, t if condition_time is None else condition_time, t)
            v_pos, v_neg = (
                dit(torch.cat((clean, x)), times, given, pack, c, torch.tensor([0, len(c)], dtype=torch.int32))[-4:]
                for c in (positive[0], negative[0])
            )
            x = x + (after - t) * (v_neg + guidance * (v_pos - v_neg))
    (ours,) = denoise(
        dit, conditions, sizes, positive, negative, seeds, sigmas=sigmas, guidance=guidance, method="euler",
        condition_time=condition_time,
    )  # fmt: skip
    assert (ours - unpatchify(x, (2, 2))).abs().max() < 2e-5


def test_guidance_in_an_interval_of_time_alone(dit):
    """All times: as without one. None: as without guidance. Some: other pictures, and each sample as if it were alone."""
    conditions, sizes, positive, negative, seeds = batch()
    everything = conditions, sizes, positive, negative, seeds
    sigmas = shift_schedule(5)
    guided = denoise(dit, *everything, sigmas=sigmas, guidance=4.0)
    assert all(map(torch.equal, denoise(dit, *everything, sigmas=sigmas, guidance=4.0, interval=(0.0, 1.0)), guided))
    plain = denoise(dit, conditions, sizes, positive, None, seeds, sigmas=sigmas)
    never = denoise(dit, *everything, sigmas=sigmas, guidance=4.0, interval=(0.9, 0.1))
    assert all(map(torch.equal, never, plain))

    calls = []
    hook = dit.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    options = {"sigmas": sigmas, "guidance": 4.0, "interval": (0.0, sigmas[2].item())}
    some = denoise(dit, *everything, **options)
    hook.remove()
    # The first two steps are too near to noise: they compute one branch, half of the patches.
    assert [2 * n for n in calls[:2]] == calls[2:4] and len(calls) == 5
    assert not any(map(torch.equal, some, guided)) and not any(map(torch.equal, some, plain))
    for s, picture in enumerate(some):
        (alone,) = denoise(dit, *(part[s : s + 1] for part in everything), **options)
        assert (alone - picture).abs().max() < 1e-4


def counted(dit, *everything, **options):
    """The pictures, and how often the network was called."""
    calls = []
    hook = dit.register_forward_hook(lambda *_: calls.append(1))
    pictures = denoise(dit, *everything, **options)
    hook.remove()
    return pictures, len(calls)


def test_steps_in_which_little_changes_reuse_velocities(dit):
    everything = batch()
    options = {"sigmas": shift_schedule(24), "guidance": 3.0}
    plain, all_steps = counted(dit, *everything, **options)
    never, same = counted(dit, *everything, **options, reuse=1e-9)
    assert all(map(torch.equal, never, plain)) and all_steps == same == 24
    # The first and the last step, and of the others every third: at most two in a row are spared.
    _, fewest = counted(dit, *everything, **options, reuse=1000.0)
    assert fewest == 9
    near, some = counted(dit, *everything, **options, reuse=0.3)
    assert 9 <= some < 24
    off = max((a - b).abs().mean().item() for a, b in zip(near, plain, strict=True))
    assert 0 < off < 0.05  # of latents whose size is 2


def test_each_sample_reuses_by_itself(dit):
    """A picture is the same alone and beside others that need more steps."""
    everything = batch()
    options = {"sigmas": shift_schedule(24), "guidance": 3.0, "reuse": 0.3}
    together, calls = counted(dit, *everything, **options)
    fewer = []
    for s in range(3):
        (alone,), own = counted(dit, *(part[s : s + 1] for part in everything), **options)
        assert (alone - together[s]).abs().max() < 1e-4
        fewer.append(own)
    assert max(fewer) <= calls < 24


def test_where_noise_is_renewed_nothing_is_reused(dit):
    options = {"sigmas": shift_schedule(8), "guidance": 3.0, "method": "ancestral", "eta": 1.5}
    plain, _ = counted(dit, *batch(), **options)
    torch.manual_seed(0)
    _, calls = counted(dit, *batch(), **options, reuse=0.3)
    assert calls == 8


def test_guidance_1_is_the_positive_branch_alone(dit, monkeypatch):
    conditions, sizes, positive, negative, seeds = batch()
    sigmas, rows = shift_schedule(3), []
    forward = DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda self, x, *a, **k: (rows.append(len(x)), forward(self, x, *a, **k))[1])
    plain = denoise(dit, conditions, sizes, positive, None, seeds, sigmas=sigmas)
    single = rows[0]
    assert rows == [single] * 3
    same = denoise(dit, conditions, sizes, positive, positive, seeds, sigmas=sigmas, guidance=4.0)
    assert rows[3:] == [2 * single] * 3  # both branches are one pack
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(plain, same, strict=True))  # equal branches: guidance cancels
    ignored = denoise(dit, conditions, sizes, positive, negative, seeds, sigmas=sigmas, guidance=1)
    assert all(torch.equal(a, b) for a, b in zip(plain, ignored, strict=True))


def test_noise_is_the_seeds_alone(dit):
    conditions, sizes, positive, _, _ = batch()
    run = [denoise(dit, conditions, sizes, positive, None, seeds, sigmas=shift_schedule(2)) for seeds in ([1, 2, 3], [1, 9, 3])]
    assert torch.equal(run[0][0], run[1][0]) and torch.equal(run[0][2], run[1][2]) and not torch.equal(run[0][1], run[1][1])
    torch.manual_seed(123)
    again = denoise(dit, conditions, sizes, positive, None, [1, 2, 3], sigmas=shift_schedule(2))
    assert all(torch.equal(a, b) for a, b in zip(run[0], again, strict=True))


def test_context_and_times_are_embedded_once_per_picture(dit, monkeypatch):
    calls = {"kv": 0, "modulations": 0}
    for name, owner, method in (("kv", dit_module.Attention, "kv"), ("modulations", DiT, "modulations")):
        original = getattr(owner, method)

        def counted(self, x, *rest, original=original, name=name):
            calls[name] += name != "kv" or x.shape[1] == 24  # keys and values of the context, not of the pictures
            return original(self, x, *rest)

        monkeypatch.setattr(owner, method, counted)
    denoise(dit, *batch(), sigmas=shift_schedule(5), guidance=2.0)
    assert calls == {"kv": len(dit.transformer_blocks), "modulations": 1}


def test_denoise_in_bf16_stays_close_and_its_state_is_fp32(dit):
    everything, options = batch(), {"sigmas": shift_schedule(4), "guidance": 2.0, "method": "euler"}
    exact, ours = (denoise(d, *everything, **options) for d in (dit, copy.deepcopy(dit).to(torch.bfloat16)))
    for a, b in zip(exact, ours, strict=True):
        assert b.dtype == torch.float32 and ((a - b).norm() / a.norm()) < 0.05


def test_what_denoise_cannot_use_is_refused(dit):
    conditions, sizes, positive, negative, seeds = batch()
    with pytest.raises(InputError, match="negative branch"):
        denoise(dit, conditions, sizes, positive, None, seeds, sigmas=shift_schedule(2), guidance=2.0)
    with pytest.raises(InputError, match="one length"):
        denoise(dit, conditions, sizes, positive[:2], None, seeds, sigmas=shift_schedule(2))
    with pytest.raises(InputError, match="multiples of 16"):
        denoise(dit, conditions, [(4, 4), (5, 2), (2, 2)], positive, negative, seeds, sigmas=shift_schedule(2), guidance=2.0)
