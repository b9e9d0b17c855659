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
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import InputError
from dit import DiT, Targets, pack_images, patchify, unpatchify
from ops import Graph, Segments, pays_to_record

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
    # The sigmoid of a normal puts most times in the middle: near data and near noise v is easily guessed, and teaches little.
    u = torch.randn(n, generator=generator).sigmoid()
    # The odds of noise to data, t / (1 - t), are multiplied by shift. Large pictures need it: neighbouring pixels are alike, so
    # that more noise is needed to hide as much.
    odds_up = shift * u
    return odds_up / (1 + (shift - 1) * u)


def patch_grid(latent: Tensor, patch: int) -> tuple[int, int]:
    """(rows, columns) of patches that a latent (C, H, W) is cut into."""
    height, width = latent.shape[-2:]
    return height // patch, width // patch


def patchify_all(pictures: list[Tensor], patch: int) -> Tensor:
    """Latents (C, H, W) of any sizes -> (N, C4), the patches of one picture behind those of the other."""
    # One by one they would cost a GPU's host more than the whole network does: those of one size in a row go together.
    parts = []
    for _, row in groupby(pictures, key=lambda z: z.shape):
        parts.append(patchify(torch.stack(list(row)), patch))
    return torch.cat(parts)


def noise_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal, of x's shape and on its device, from a seed that the host's generator draws."""
    seed = torch.randint(2**62, (), generator=generator).item()
    own = torch.Generator(x.device).manual_seed(seed)
    return torch.randn(x.shape, device=x.device, generator=own)


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

        # All pictures of all samples become one packed sequence, so that pictures of any size share one batch without padding.
        grids = []
        for pictures in samples.latents:
            grids.append([patch_grid(z, patch) for z in pictures])
        pack = pack_images(grids, device)

        # The pack knows the image of each patch; which sample that belongs to, and whether it is given, only we know.
        sample_of = []
        is_given = []
        for s, pictures in enumerate(samples.latents):
            for k in range(len(pictures)):
                sample_of.append(s)
                is_given.append(k < samples.clean[s])
        sample = torch.tensor(sample_of, device=device)                                # (I,)
        given = torch.tensor(is_given, device=device)                                  # (I,)

        # Given pictures have a time of their own, just above 0: the network learns to trust them as they are.
        target_times = t.to(device)[sample]                                            # (I,)
        times = torch.where(given, self.condition_time, target_times)                  # (I,)
        given_token = given[pack.image_ids][:, None]                                   # (N, 1)
        t_token = times[pack.image_ids][:, None]                                       # (N, 1)
        x0 = patchify_all([z for pictures in samples.latents for z in pictures], patch)  # (N, C4)

        # Drawn on the device, which takes a GPU microseconds where the host needs as long as the GPU does for a layer; what is
        # drawn hangs on the host's generator. Given pictures get their share and do not use it: one draw for all is simpler
        # than one for each target.
        eps = noise_like(x0, noise)                                                    # (N, C4)
        mixed = interpolate(x0, eps, t_token)                                          # (N, C4)
        x = torch.where(given_token, x0, mixed)                                        # (N, C4)

        # What a sample reads of the text: the connector's rows of the tokens before its BOV. The connector runs once over all
        # tokens, since several samples of a document read the same ones.
        rows = torch.from_numpy(np.concatenate([np.arange(r.start, r.stop) for r in samples.rows]))
        context = self.dit.crossattn_proj(samples.features)                            # (M, D_text)
        context = context.index_select(0, rows.to(device))                             # (M', D_text)
        keys = Segments([len(r) for r in samples.rows], device)

        # In fp32, whatever the network computes in: a sum of many squares needs more than the two digits of bf16.
        v = self.dit(x, times, given, pack, context, keys)                             # (N, C4)
        difference = v.float() - velocity_target(x0, eps)                              # (N, C4)
        error = difference.square().mean(1)                                            # (N,)

        # The error counts on targets alone. Sums, not means: the caller divides by the tokens of all ranks, or a rank with few
        # of them would weigh each more.
        target = (~given_token[:, 0]).float()                                          # (N,)
        both = torch.stack((error * target, target))                                   # (2, N)
        per_sample = torch.zeros(2, len(samples.rows), device=device)
        return tuple(per_sample.index_add(1, sample[pack.image_ids], both))


# -------------------------------------------------------------------------------------------------------------- schedules


def shift_schedule(steps: int, shift: float = 5.0) -> Tensor:
    """Cosmos' schedule for its pre-trained weights: even steps from 0.999 to 0, shifted as in training. (steps + 1,) sigmas."""
    # The shift of train_times: sampling spends its steps where training spent its samples. Not from 1: there x holds nothing
    # of the data, and ln((1 - s) / s), which UniPC counts in, is -inf.
    u = torch.linspace(0.999, 0.0, steps + 1, dtype=torch.float64)
    sigmas = shift * u / (1 + (shift - 1) * u)
    return sigmas.float()


def karras_schedule(steps: int, sigma_min: float = 0.01, sigma_max: float = 200.0, rho: float = 7.0) -> Tensor:
    """Cosmos' schedule for its post-trained weights: noise levels k of Karras (2206.00364, eq. 5) as k / (1 + k), then 0."""
    # Even steps in the rho-th root of the noise level: the larger rho, the more of them at low noise, where details form.
    high = sigma_max ** (1 / rho)
    low = sigma_min ** (1 / rho)
    fraction = torch.linspace(0, 1, steps, dtype=torch.float64)
    k = (high + fraction * (low - high)) ** rho

    # Karras adds noise to data that stays whole, x_0 + k eps. Divided by 1 + k that is our x_t with t = k / (1 + k).
    t = k / (1 + k)
    return F.pad(t, (0, 1)).float()


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
    # On the host: a step's coefficients are plain numbers, so no step reads one back from the device.
    s = sigmas.tolist()
    steps = len(s) - 1
    stalls = any(a <= b for a, b in zip(s, s[1:], strict=False))
    if steps < 1 or s[-1] != 0 or stalls or not s[0] < 1:
        raise InputError("a schedule falls from below 1 to 0 in at least one step")
    if method not in SAMPLERS:
        raise InputError(f"no sampler {method!r}; there are {', '.join(SAMPLERS)}")

    # In fp32, whatever the network computes in: small steps are added up here, and bf16 has two digits to add them with.
    x = x.float()
    solver = UniPC(s)
    for i in range(steps):
        v = velocity(x, s[i]).float()
        if method == "unipc":
            x = solver.step(i, x, v)
        else:
            x = x + (s[i + 1] - s[i]) * v
        # The last step ends in data, where there is no noise left to renew.
        if method == "ancestral" and s[i + 1]:
            x = renew_noise(x, v, s[i], s[i + 1], eta, noise())
        if progress is not None:
            progress(i + 1, steps)
    return x


def renew_noise(x: Tensor, v: Tensor, before: float, after: float, eta: float, fresh_noise: Tensor) -> Tensor:
    """x at time `after`, a share of whose noise is exchanged for fresh noise of the same strength; v from the step before."""
    # Noise per data is s / (1 - s). By how much it shrank says how much of the old noise the posterior of the step keeps.
    kept = (1 - before) * after / ((1 - after) * before)
    # Amplitudes of independent noises add in squares: with kept^2 + fresh^2 = 1 the strength stays what the network expects.
    fresh = min(1, eta * math.sqrt(1 - kept**2))
    # All noise in x, as predicted: x = (1 - s) x_0 + s eps and v = eps - x_0 give eps = x + (1 - s) v.
    eps = x + (1 - after) * v
    old = math.sqrt(1 - fresh**2)
    return x + after * ((old - 1) * eps + fresh * fresh_noise)


class UniPC:
    """The memory of the multistep sampler: x_0 predictions m of the last two steps, and the corrected state before this step.

    With lam = ln((1 - s) / s), a step from s_0 to s_1 has h = lam_1 - lam_0, E = e^-h - 1, and the flow is solved exactly by
        x_1 = (s_1 / s_0) x_0 - (1 - s_1) E mean(m),
    the mean of the predictions along the step, weighted by e^lam. (Here x_0 is the state at s_0.) Were m constant, any step
    would be exact. Of the mean a method of order 2 knows m_0 and differences D of m to other points of time.
    """

    def __init__(self, sigmas: list[float]):
        self.s = sigmas
        # Infinite at s = 0, where no noise is left; the last step takes a way of its own.
        self.lam = [math.log((1 - s) / s) if s > 0 else math.inf for s in sigmas]
        self.m: list[Tensor] = []  # predictions of the steps so far, newest last
        self.corrected: Tensor | None = None  # state at the start of the last step
        self.order = 0  # of the last step

    def step(self, i: int, x: Tensor, v: Tensor) -> Tensor:
        """The state after step i, given x as predicted for its start and the velocity there."""
        s = self.s
        m = x - s[i] * v                                                               # prediction of the data

        # Corrector: redo the last step, now that the prediction at its end is known. It costs no call of the network. The
        # prediction itself is not made again from the better x: that would cost one.
        if i > 0:
            x = self._corrected(i, m)
        self.corrected = x
        # The first step has nothing to look back on. In the last one extrapolation has no later step to mend it.
        self.order = min(2, i + 1, len(s) - 1 - i)

        # Predictor. At s = 0, E is -1 and the step is the prediction itself.
        if s[i + 1] == 0:
            return m
        return self._predicted(i, x, m)

    def _corrected(self, i: int, m: Tensor) -> Tensor:
        """The state at s_i once more: from step i - 1, with m, the prediction at its end."""
        s = self.s
        lam = self.lam
        h = lam[i] - lam[i - 1]
        e = math.expm1(-h)  # not exp(-h) - 1, which loses digits in small steps
        previous = self.m[-1]

        # Order 1: a line between start and end, whose mean is half of the difference.
        rho = 0.5
        difference = 0.0

        # Order 2: a parabola through one more prediction. On the clock tau = (lam - lam_0) / h the step goes from 0 to 1, and
        # the prediction before it was made at tau = r < 0. b1 and b2 are the weighted means of tau and tau^2.
        if self.order == 2:
            r = (lam[i - 2] - lam[i - 1]) / h
            p = e / -h - 1
            b1 = p / e
            b2 = 2 * (p / -h - 0.5) / e
            # Both means come out right if rho_old + rho = b1 and r rho_old + rho = b2.
            rho_old = (b2 - b1) / (r - 1)
            rho = b1 - rho_old
            difference = rho_old / r * (self.m[-2] - previous)

        mean = previous + difference + rho * (m - previous)
        return s[i] / s[i - 1] * self.corrected - (1 - s[i]) * e * mean

    def _predicted(self, i: int, x: Tensor, m: Tensor) -> Tensor:
        """The state at s_{i+1}, from x and the prediction m at s_i; m is remembered for the steps to come."""
        s = self.s
        lam = self.lam
        h = lam[i + 1] - lam[i]
        e = math.expm1(-h)
        # Order 2: the line through the last two predictions goes on as before, and the mean lies half a step ahead on it.
        mean = m
        if self.order == 2:
            half_step = 0.5 * h / (lam[i - 1] - lam[i])
            mean = m + half_step * (self.m[-1] - m)
        # Two are enough for order 2; older ones would only hold memory.
        self.m = [*self.m[-1:], m]
        return s[i + 1] / s[i] * x - (1 - s[i + 1]) * e * mean


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
    interval: tuple[float, float] = (0.0, 1.0),
    reuse: float = 0.0,
    method: str = "unipc",
    condition_time: float | None = CONDITION_TIME,
    progress: Callable[[int, int], None] | None = None,
    graphs: bool | None = False,
    eta: float = 1.0,
    watch: Callable[[int, list[Tensor]], None] | None = None,
) -> list[Tensor]:
    """Paint one picture for each of S samples -> S normalised latents (C, H, W) in fp32.

    conditions: each sample's clean latents (C, h, w) in time order, possibly none; sizes: (H, W) of the latents to paint.
    positive, negative: each sample's context (M, text_embed_dim) for the branches of v = v_neg + guidance (v_pos - v_neg), the
    usual scale (Cosmos' g is guidance - 1). Both branches run as one pack; at guidance 1 there is no negative one and it may be
    None. interval: times (lowest, highest) between which there is guidance; elsewhere v_pos alone is computed, at half the cost
    (Kynkaanniemi et al., arXiv 2404.07724). reuse: threshold of `Reuse`, 0 for none. seeds: a sample's noise depends on its
    seed and size alone. condition_time: t of the clean images; None: that of the target, as for Cosmos' pre-trained weights.
    graphs: one CUDA graph serves all steps but the first; None: where that pays (ops.pays_to_record). method, eta: sample_flow.
    watch(i, latents) is shown in step i what the network makes of the pictures so far: its predictions of the data, S latents
    (C, H, W).
    """
    branches = 1 if guidance == 1 else 2
    contexts = _contexts(positive, negative, guidance)
    per_branch = len(contexts) // branches
    if not len(conditions) == len(sizes) == len(seeds) == per_branch or len(contexts) % branches:
        raise InputError("denoise: conditions, sizes, contexts and seeds must be of one length")
    device = dit.proj_out.weight.device
    patch = dit.config.patch_size[1]

    # Each picture begins as noise. Everything else of the batch stays as it lies while the sampler walks.
    noise = Noise([(dit.config.out_channels, *size) for size in sizes], seeds)
    start = noise.draw()
    times = sigmas[:-1].tolist()
    guided = Branches(dit, Canvas(conditions, start, branches, patch, device), contexts, times, condition_time, guidance)
    canvas = guided.canvas
    # Outside the interval there is one branch.
    low, high = interval
    outside = [not low <= t <= high for t in times]
    plain = guided
    if branches == 2 and any(outside):
        plain = Branches(dit, Canvas(conditions, start, 1, patch, device), positive, times, condition_time)

    # x and the row are all that differs between steps, so a recording of one step serves for the others.
    record = pays_to_record(graphs, device, len(canvas.pack.positions), dit.config.width)
    steps = {network: Graph(network.velocity) if record else network.velocity for network in {guided, plain}}

    memory = Reuse(reuse, canvas, times)

    def velocity_at(x: Tensor, t: float) -> Tensor:
        i = times.index(t)
        network = plain if outside[i] else guided
        v = memory(i, x, lambda: steps[network](x, network.rows[i]))
        if watch is not None:
            watch(i, canvas.pictures(x - t * v))
        return v

    def fresh_noise() -> Tensor:
        patches = [patchify(z, patch) for z in noise.draw()]
        return torch.cat(patches).to(device)                                           # (P, C4)

    x = canvas.start[canvas.painted]                                                   # (P, C4)
    x = sample_flow(velocity_at, x, sigmas, method, progress, eta, fresh_noise)        # (P, C4)
    return canvas.pictures(x)


def _contexts(positive: list[Tensor], negative: list[Tensor] | None, guidance: float) -> list[Tensor]:
    """The contexts of all branches, the positive one first."""
    # At guidance 1, v_neg + 1 (v_pos - v_neg) is v_pos: the negative branch cancels out, and half of the work is saved.
    if guidance == 1:
        return positive
    if negative is None:
        raise InputError(f"guidance {guidance} needs the contexts of the negative branch; without them it is 1")
    return [*positive, *negative]


class Noise:
    """A stream of noise for each sample, from a generator of its own: it stays the same whatever else is in the batch."""

    def __init__(self, shapes: list[tuple[int, ...]], seeds: list[int]):
        self.shapes = shapes
        # On the host, so that a seed paints the same picture on every device.
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(self) -> list[Tensor]:
        """The next noise of each sample, (C, H, W)."""
        drawn = []
        for shape, generator in zip(self.shapes, self.generators, strict=True):
            drawn.append(torch.randn(shape, generator=generator))
        return drawn


class Canvas:
    """How a batch lies before the DiT, and where in it the pictures are that are painted."""

    def __init__(self, conditions: list[list[Tensor]], noise: list[Tensor], branches: int, patch: int, device: torch.device):
        """conditions, noise: of each sample its clean latents (C, h, w), and (C, H, W) where its picture will be."""
        # A sample is its clean pictures and then, as noise, the one to be painted: time runs from what is known to what is new.
        self.grids = []
        patches = []
        is_given = []
        for clean, start in zip(conditions, noise, strict=True):
            latents = [*clean, start]
            self.grids.append([patch_grid(z, patch) for z in latents])
            patches += [patchify(z.float(), patch).to(device) for z in latents]
            is_given += [True] * len(clean) + [False]
        self.patch = patch
        self.start = torch.cat(patches)  # (n, C4) of one branch: the branches share the pictures and differ in context

        # The branches of guidance lie behind each other in one pack: one large call of the network instead of two small ones.
        self.pack = pack_images(self.grids * branches, device)
        self.given = torch.tensor(is_given * branches)  # (I,) on the host
        self.targets = Targets(self.pack, is_given * branches)

        # The sampler walks what is painted in the first branch alone: both stand at the same x in every step.
        of_one_branch = len(self.targets.rows) // branches
        self.painted = self.targets.rows[:of_one_branch]  # (P,) their places in start

    def pictures(self, x: Tensor) -> list[Tensor]:
        """The painted patches (P, C4) as latents (C, H, W), one for each sample."""
        shapes = [sample[-1] for sample in self.grids]
        patches = x.split([rows * columns for rows, columns in shapes])
        return [unpatchify(z, shape, self.patch) for z, shape in zip(patches, shapes, strict=True)]


class Branches:
    """The network on one canvas: whatever a step needs besides x is on the device before the first, and nothing waits for it.

    contexts: of each sample in each branch, (M, text_embed_dim); times: of the steps; guidance: of two branches.
    """

    def __init__(
        self,
        dit: DiT,
        canvas: Canvas,
        contexts: list[Tensor],
        times: list[float],
        condition_time: float | None,
        guidance: float = 1.0,
    ):
        device = canvas.start.device
        self.dit = dit
        self.canvas = canvas
        self.branches = len(contexts) // len(canvas.grids)
        self.guidance = guidance
        self.given = canvas.given.to(device)
        self.kv = dit.context_kv(torch.cat(contexts).to(device))
        self.keys = Segments([len(c) for c in contexts], device)
        self.rope = dit.rope(canvas.pack.positions)
        self.table, self.rows = _modulations(dit, times, canvas.given, condition_time, device)  # (T + 1, 9D) a block, (T, I)

    def velocity(self, x: Tensor, row: Tensor) -> Tensor:
        """x (P, C4): the painted patches at one time -> their guided velocity (P, C4); row (I,): each image's modulations."""
        canvas = self.canvas
        x = canvas.start.index_copy(0, canvas.painted, x).repeat(self.branches, 1)     # (N, C4)
        v = self.dit(
            x,
            None,
            self.given,
            canvas.pack,
            None,
            self.keys,
            kv=self.kv,
            modulations=(self.table, row),
            rope=self.rope,
            targets=canvas.targets,
        )
        v = v.unflatten(0, (self.branches, -1))                                        # (branches, P, C4)
        if self.branches == 1:
            return v[0]
        # Beyond 1 this goes past v_pos, away from what the negative context asks for.
        return torch.lerp(v[1], v[0], self.guidance)


class Reuse:
    """Steps in which little has changed take a velocity from those of the steps before (SeaCache, arXiv 2602.18993).

    How much has changed is seen in the state itself, through a Wiener filter that passes what is signal at this time: early the
    coarse shapes, later the details. Its relative changes add up from step to step; below the threshold the velocity is the
    line through the last two that were computed. The first and the last step are always computed, and at most MOST in a row are
    not. Each sample decides for itself, so that a picture is the same alone and in a batch; the network is spared where all do.

    Steps that renew the noise (sampler ancestral) change all of the state: there nothing is spared.
    """

    MOST = 2
    SLOPE = 3.0  # natural pictures have a spectrum of 1 / frequency^3 along each axis (the paper's value)

    def __init__(self, threshold: float, canvas: Canvas, times: list[float]):
        self.threshold = threshold
        self.canvas = canvas
        self.times = times
        samples = len(canvas.grids)
        self.seen: list[Tensor] | None = None  # the filtered states of the step before
        self.change = [0.0] * samples
        self.spared = [0] * samples  # steps in a row
        self.known: list[list[tuple[float, Tensor]]] = [[] for _ in range(samples)]  # the last two (time, velocity) computed

    def __call__(self, i: int, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """The velocity (P, C4) in step i at the state x (P, C4)."""
        if self.threshold == 0:
            return compute()
        due = self._due(i, x)
        sizes = [sample[-1][0] * sample[-1][1] for sample in self.canvas.grids]
        fresh = compute().split(sizes) if any(due) else None
        parts = []
        for s, is_due in enumerate(due):
            if is_due:
                parts.append(fresh[s])
                self.known[s] = [*self.known[s][-1:], (self.times[i], fresh[s])]
                self.change[s] = 0.0
                self.spared[s] = 0
            else:
                parts.append(self._extrapolated(s, self.times[i]))
                self.spared[s] += 1
        return torch.cat(parts)

    def _due(self, i: int, x: Tensor) -> list[bool]:
        """Which samples need their velocity computed."""
        states = [self._filtered(z, self.times[i]) for z in self.canvas.pictures(x)]
        before = self.seen
        self.seen = states
        if before is None or i == len(self.times) - 1:
            return [True] * len(states)
        changes = [((a - b).abs().mean() / b.abs().mean()) for a, b in zip(states, before, strict=True)]
        for s, change in enumerate(torch.stack(changes).tolist()):
            self.change[s] += change
        return [c >= self.threshold or n >= self.MOST for c, n in zip(self.change, self.spared, strict=True)]

    def _filtered(self, z: Tensor, t: float) -> Tensor:
        """What is signal in a state z (C, H, W) at time t, by the Wiener filter along both axes."""
        t = min(max(t, 1e-6), 1 - 1e-6)
        gain = 1.0
        for axis in (1, 2):
            frequency = torch.fft.fftfreq(z.shape[axis], device=z.device).abs()
            power = 1 / (frequency**self.SLOPE + 1e-16)
            own = (1 - t) * power / ((1 - t) ** 2 * power + t**2)
            gain = gain * own.view(*(-1 if a == axis else 1 for a in (1, 2)))
        gain = gain / gain.mean()
        return torch.fft.ifft2(torch.fft.fft2(z) * gain).real

    def _extrapolated(self, s: int, t: float) -> Tensor:
        """A sample's velocity at time t, on the line through the last two."""
        t1, v1 = self.known[s][-1]
        if len(self.known[s]) == 1:
            return v1
        t0, v0 = self.known[s][0]
        return v1 + (t - t1) / (t1 - t0) * (v1 - v0)


def _modulations(
    dit: DiT, times: list[float], given: Tensor, condition_time: float | None, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """What every block is modulated by, for all T steps at once: tables of T + 1 rows, and which row (T, I) each image reads.

    Modulations depend on time alone. Row i is that of step i, the last one that of clean pictures.
    """
    clean_time = condition_time
    if condition_time is None:
        clean_time = 0.0  # nobody reads that row
    table = dit.modulations(torch.tensor([*times, clean_time], device=device))
    steps = torch.arange(len(times))[:, None]                                          # (T, 1)
    has_own_time = given & (condition_time is not None)                                # (I,)
    rows = torch.where(has_own_time, len(times), steps)                                # (T, I)
    return table, rows.to(device)
