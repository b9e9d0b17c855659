"""The flow that the painter is trained on and samples from: its convention, its loss, noise schedules, samplers, guidance.

+-- The flow convention of this repository --------------------------------------------------------------------------+
|  x_t = (1 - t) x_0 + t eps     t = 0 is data, t = 1 is noise   (Lipman et al. 2210.02747, Liu et al. 2209.03003)   |
|  v   = eps - x_0               what the network predicts; x_0 = x_t - t v                                          |
|  dx  = v dt                    sampling walks t from 1 to 0                                                        |
+--------------------------------------------------------------------------------------------------------------------+

Training (stage 2) draws t, mixes noise into the target picture and asks for v:

    error, tokens = FlowLoss(dit, CONDITION_TIME)(samples, train_times(n, shift, generator), generator)

Sampling walks a schedule of noise levels from noise to a picture, all earlier pictures given clean:

    [latent] = denoise(dit, [[clean]], [(88, 160)], [context], [negative], [seed], sigmas=shift_schedule(35), guidance=8.0)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import InputError
from dit import DiT, Targets, pack_images, patchify, unpatchify
from ops import Graph, Segments

SAMPLERS = "unipc", "euler", "ancestral"  # of sample_flow
CONDITION_TIME = 1e-4  # t of clean images for the post-trained Cosmos checkpoint (its pipeline's default)


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t eps; t broadcasts."""
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """v = eps - x_0."""
    return noise - x0


# --------------------------------------------------------------------------------------------------------------- training


def train_times(n: int, shift: float = 5.0, generator: torch.Generator | None = None) -> Tensor:
    """n training times (n,): u = sigmoid(N(0, 1)) moved towards noise, t = shift u / (1 + (shift - 1) u).

    The median is shift / (1 + shift). Cosmos-Predict2.5 draws from a table of 1000 such values; this is its continuous form.
    """
    u = torch.randn(n, generator=generator).sigmoid()
    return shift * u / (1 + (shift - 1) * u)


@dataclass
class Samples:
    """What the flow loss of one micro-batch is taken on: S samples, each a row of pictures of which the first are given."""

    features: Tensor  # (M, L * H) MLLM states of all tokens of the documents
    rows: list[range]  # for each sample the tokens it reads
    latents: list[list[Tensor]]  # for each sample its pictures (C, H, W) in time order
    clean: list[int]  # how many of them are given; the others are targets


class FlowLoss(nn.Module):
    """Flow-matching error of connector and DiT on packed samples; one module with one forward, which DDP needs."""

    def __init__(self, dit: DiT, condition_time: float):
        super().__init__()
        self.dit = dit
        self.condition_time = condition_time

    def forward(self, samples: Samples, t: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        """t (S,): time of each sample's targets. Returns (S,) sums over target tokens of |v_hat - v|^2 / channels, (S,) tokens.

        Given pictures enter clean, at the time condition_time, and carry no loss (backbone's convention, `denoise`).
        """
        device = samples.features.device
        patch = self.dit.config.patch_size[1]

        # All pictures of all samples become one packed sequence; of each we note its sample and whether it is given.
        grids = [[(z.shape[-2] // patch, z.shape[-1] // patch) for z in pictures] for pictures in samples.latents]
        pack = pack_images(grids, device)
        sample_of, is_given = [], []
        for s, pictures in enumerate(samples.latents):
            for k in range(len(pictures)):
                sample_of.append(s)
                is_given.append(k < samples.clean[s])
        sample = torch.tensor(sample_of, device=device)                                # (I,)
        given = torch.tensor(is_given, device=device)                                  # (I,)

        # Given pictures stay as they are; into a target goes as much noise as its sample's t says.
        times = torch.where(given, self.condition_time, t.to(device)[sample])          # (I,)
        given_token = given[pack.image_ids][:, None]                                   # (N, 1)
        t_token = times[pack.image_ids][:, None]                                       # (N, 1)
        x0 = torch.cat([patchify(z, patch) for pictures in samples.latents for z in pictures])         # (N, C4)
        eps = torch.randn(x0.shape, generator=noise).to(device)                        # (N, C4)
        x = torch.where(given_token, x0, interpolate(x0, eps, t_token))                # (N, C4)

        # What a sample reads of the text: the connector's rows of the tokens before its BOV.
        rows = torch.cat([torch.arange(r.start, r.stop) for r in samples.rows]).to(device)
        context = self.dit.crossattn_proj(samples.features).index_select(0, rows)      # (M', D_text)
        keys = Segments([len(r) for r in samples.rows], device)

        # The error counts on targets alone. Sums, not means: the caller divides by the tokens of all ranks.
        v = self.dit(x, times, given, pack, context, keys)                             # (N, C4)
        error = (v.float() - velocity_target(x0, eps)).square().mean(1)                # (N,)
        target = (~given_token[:, 0]).float()                                          # (N,)
        both = torch.stack((error * target, target))                                   # (2, N)
        per_sample = torch.zeros(2, len(samples.rows), device=device)
        return tuple(per_sample.index_add(1, sample[pack.image_ids], both))


# -------------------------------------------------------------------------------------------------------------- schedules


def shift_schedule(steps: int, shift: float = 5.0) -> Tensor:
    """Cosmos' schedule for its pre-trained weights: even steps from 0.999 to 0, shifted as in training. (steps + 1,) sigmas."""
    u = torch.linspace(0.999, 0.0, steps + 1, dtype=torch.float64)
    return (shift * u / (1 + (shift - 1) * u)).float()


def karras_schedule(steps: int, sigma_min: float = 0.01, sigma_max: float = 200.0, rho: float = 7.0) -> Tensor:
    """Cosmos' schedule for its post-trained weights: noise levels k of Karras (2206.00364, eq. 5) as k / (1 + k), then 0."""
    high = sigma_max ** (1 / rho)
    low = sigma_min ** (1 / rho)
    k = (high + torch.linspace(0, 1, steps, dtype=torch.float64) * (low - high)) ** rho
    return F.pad(k / (1 + k), (0, 1)).float()


# --------------------------------------------------------------------------------------------------------------- samplers


def sample_flow(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    sigmas: Tensor,
    method: str = "unipc",
    progress: Callable[[int, int], None] | None = None,
    eta: float = 1.0,
    noise: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Walk from noise x at sigmas[0] to data at sigmas[-1] = 0 in len(sigmas) - 1 calls of velocity(x, t); state in fp32.

    "euler": x += (t' - t) v. "unipc": UniPC of order 2 on the prediction of x_0 with B(h) = e^-h - 1 (Zhao et al. 2302.04867;
    diffusers' "bh2"), each call of the network correcting the last step before it predicts the next. "ancestral": Euler which
    in each step replaces a part of the noise in x by fresh noise(), shaped like x, so that later steps mend what earlier ones
    did wrong: DDIM's eta (Song et al. 2010.02502, eq. 16) for this flow; above 1, pictures vary less. progress(done, steps).
    """
    s = sigmas.tolist()
    steps = len(s) - 1
    if steps < 1 or s[-1] != 0 or any(a <= b for a, b in zip(s, s[1:], strict=False)) or not s[0] < 1:
        raise InputError("a schedule falls from below 1 to 0 in at least one step")
    if method not in SAMPLERS:
        raise InputError(f"no sampler {method!r}; there are {', '.join(SAMPLERS)}")
    x = x.float()
    solver = UniPC(s)
    for i in range(steps):
        v = velocity(x, s[i]).float()
        x = solver.step(i, x, v) if method == "unipc" else x + (s[i + 1] - s[i]) * v
        # The last step ends in data, where there is no noise left to renew.
        if method == "ancestral" and s[i + 1]:
            x = renew_noise(x, v, s[i], s[i + 1], eta, noise())
        if progress is not None:
            progress(i + 1, steps)
    return x


def renew_noise(x: Tensor, v: Tensor, before: float, after: float, eta: float, fresh_noise: Tensor) -> Tensor:
    """x at time `after`, a share of whose noise is exchanged for fresh noise of the same strength; v from the step before."""
    kept = (1 - before) * after / ((1 - after) * before)
    fresh = min(1, eta * math.sqrt(1 - kept**2))                                       # share of the noise, in amplitude
    eps = x + (1 - after) * v                                                          # all of it, as predicted
    return x + after * ((math.sqrt(1 - fresh**2) - 1) * eps + fresh * fresh_noise)


class UniPC:
    """The memory of the multistep sampler: x_0 predictions m of the last two steps, and the corrected state before this step.

    With lam = ln((1 - s) / s), a step from s_0 to s_1 has h = lam_1 - lam_0, E = e^-h - 1, and in terms of predictions
        x_1 = (s_1 / s_0) x_0 - (1 - s_1) E (m_0 + sum of differences D of the m, weighted so that the order is met).
    """

    def __init__(self, sigmas: list[float]):
        self.s = sigmas
        self.lam = [math.log((1 - s) / s) if s > 0 else math.inf for s in sigmas]
        self.m: list[Tensor] = []  # predictions of the steps so far, newest last
        self.corrected: Tensor | None = None  # state at the start of the last step
        self.order = 0  # of the last step

    def step(self, i: int, x: Tensor, v: Tensor) -> Tensor:
        """The state after step i, given x as predicted for its start and the velocity there."""
        s, lam = self.s, self.lam
        m = x - s[i] * v                                                               # prediction of the data

        # Redo the last step, now knowing the prediction at its end.
        if i > 0:
            h = lam[i] - lam[i - 1]
            e = math.expm1(-h)
            previous = self.m[-1]
            rho, difference = 0.5, 0.0
            if self.order == 2:
                r = (lam[i - 2] - lam[i - 1]) / h
                p = e / -h - 1
                b1 = p / e
                b2 = 2 * (p / -h - 0.5) / e
                rho_old = (b2 - b1) / (r - 1)  # rho_old + rho = b1, r rho_old + rho = b2
                rho = b1 - rho_old
                difference = rho_old / r * (self.m[-2] - previous)
            x = s[i] / s[i - 1] * self.corrected - (1 - s[i]) * e * (previous + difference + rho * (m - previous))
        self.corrected = x
        self.order = min(2, i + 1, len(s) - 1 - i)                                     # the last step is of order 1

        # Predict the next state. At s = 0, E is -1 and the step is the prediction itself.
        if s[i + 1] == 0:
            return m
        h = lam[i + 1] - lam[i]
        e = math.expm1(-h)
        guess = m
        if self.order == 2:
            guess = m + 0.5 * h / (lam[i - 1] - lam[i]) * (self.m[-1] - m)
        self.m = [*self.m[-1:], m]
        return s[i + 1] / s[i] * x - (1 - s[i + 1]) * e * guess


# --------------------------------------------------------------------------------------------------------------- painting


@torch.no_grad()
def denoise(
    dit: DiT,
    conditions: list[list[Tensor]],
    sizes: list[tuple[int, int]],
    positive: list[Tensor],
    negative: list[Tensor] | None,
    seeds: list[int],
    *,
    sigmas: Tensor,
    guidance: float = 1.0,
    method: str = "unipc",
    condition_time: float | None = CONDITION_TIME,
    progress: Callable[[int, int], None] | None = None,
    graphs: bool = False,
    eta: float = 1.0,
) -> list[Tensor]:
    """Paint one picture for each of S samples -> S normalised latents (C, H, W) in fp32.

    conditions: each sample's clean latents (C, h, w) in time order, possibly none; sizes: (H, W) of the latents to paint.
    positive, negative: each sample's context (M, text_embed_dim) for the branches of v = v_neg + guidance (v_pos - v_neg), the
    usual scale (Cosmos' g is guidance - 1). Both branches run as one pack; at guidance 1 there is no negative one and it may be
    None. seeds: a sample's noise depends on its seed and size alone. condition_time: t of the clean images; None: that of the
    target, as for Cosmos' pre-trained weights. graphs: one CUDA graph serves all steps but the first. method, eta: sample_flow.
    """
    if guidance != 1 and negative is None:
        raise InputError(f"guidance {guidance} needs the contexts of the negative branch; without them it is 1")
    contexts = [*positive] if guidance == 1 else [*positive, *negative]
    branches = 1 if guidance == 1 else 2
    if not len(conditions) == len(sizes) == len(seeds) == len(contexts) // branches or len(contexts) % branches:
        raise InputError("denoise: conditions, sizes, contexts and seeds must be of one length")
    device = dit.proj_out.weight.device
    patch = dit.config.patch_size[1]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise() -> list[Tensor]:
        """Noise (C, H, W) for each sample's target, from that sample's own generator."""
        shapes = [(dit.config.out_channels, *size) for size in sizes]
        return [torch.randn(shape, generator=g) for shape, g in zip(shapes, generators, strict=True)]

    def fresh_noise() -> Tensor:
        return torch.cat([patchify(z, patch) for z in noise()]).to(device)             # (P, C4)

    # A sample is its clean pictures and then, as noise, the one to be painted; the branches of guidance share them.
    latents = [[*clean, start] for clean, start in zip(conditions, noise(), strict=True)]
    grids = [[(z.shape[1] // patch, z.shape[2] // patch) for z in sample] for sample in latents]
    pack = pack_images(grids * branches, device)
    start = torch.cat([patchify(z.float(), patch).to(device) for sample in latents for z in sample])   # (n, C4), one branch
    given = [k < len(sample) - 1 for sample in latents for k in range(len(sample))]
    targets = Targets(pack, given * branches)
    painted = targets.rows[: len(targets.rows) // branches]                            # (P,) of the first branch
    given = torch.tensor(given * branches)                                             # (I,)

    # Whatever a step needs besides x is on the device before the first: nothing of the loop waits for it.
    kv = dit.context_kv(torch.cat(contexts).to(device))
    keys = Segments([len(c) for c in contexts], device)
    rope = dit.rope(pack.positions)

    # A row of modulations for each time of the schedule, and one for clean pictures; then, of each step, every image's row.
    times = sigmas[:-1].tolist()
    clean_time = 0.0 if condition_time is None else condition_time
    table = dit.modulations(torch.tensor([*times, clean_time], device=device))
    steps = torch.arange(len(times))[:, None]                                          # (steps, 1)
    rows = torch.where(given & (condition_time is not None), len(times), steps).to(device)             # (steps, I)
    given = given.to(device)

    def velocity(x: Tensor, row: Tensor) -> Tensor:
        """x (P, C4): the painted patches at one time -> their guided velocity (P, C4); row (I,): each image's modulations."""
        x = start.index_copy(0, painted, x).repeat(branches, 1)                        # (N, C4)
        v = dit(x, None, given, pack, None, keys, kv=kv, modulations=(table, row), rope=rope, targets=targets)
        v = v.unflatten(0, (branches, -1))                                             # (branches, P, C4)
        return v[0] if branches == 1 else torch.lerp(v[1], v[0], guidance)

    step = Graph(velocity) if graphs else velocity

    def velocity_at(x: Tensor, t: float) -> Tensor:
        return step(x, rows[times.index(t)])

    x = sample_flow(velocity_at, start[painted], sigmas, method, progress, eta, fresh_noise)           # (P, C4)
    shapes = [sample[-1] for sample in grids]
    patches = x.split([h * w for h, w in shapes])
    return [unpatchify(z, shape, patch) for z, shape in zip(patches, shapes, strict=True)]
