"""GenDR-Pix: one-step super-resolution without a VAE, from its ancestors up.

Chapter 2 turns the T-step prior of `resshift.py` into a one-step restorer with S3Diff's
degradation-guided LoRA (GenDR); chapter 3 replaces its VAE encoder by pixel-unshuffle
(GenDR-Adc), chapter 4 its decoder by pixel-shuffle (GenDR-Pix).  Each chapter's model
is the next chapter's teacher, its starting point and its critic.

Papers: GenDR-Pix, arXiv 2602.10630; GenDR, 2503.06790; S3Diff, 2409.17058;
        ResShift, 2307.12348.

    python gendr_pix.py --train --tiny              all chapters; 10 minutes, 2 cores
    python gendr_pix.py --tiny --input lq.png --output up.png
    python gendr_pix.py --tiny --eval               the table once more

The first ends in:  PASS: runs/tiny, 10.0 minutes on cpu, 2 threads, seed 0

    restore(lq):  end_in(lq)  ->  U-Net, one step  ->  end_out
    GenDR         VAE encoder                          VAE decoder
    GenDR-Adc     pixel-unshuffle x8                   VAE decoder
    GenDR-Pix     pixel-unshuffle x8                   pixel-shuffle x8

Symbols: B batch, C channels, H W full resolution, h w latent resolution, f = 8;
         r LoRA rank, D discriminator, G generator; "not in the paper": our choices.
Ranges:  images are float in [-1, 1] inside, [0, 1] in metrics, uint8 in files.
"""
import copy
import json
import math
import time
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resshift import (
    NEGATIVE, POSITIVE, Perceptual, PixelShuffle, Pool, Prompts, Run, Turn, UserError,
    chapter, chapter_one, check_config, check_output, command_line, config_from,
    config_parser, degrade, device, evaluate, from_pil, held_out, load_chapter_one,
    load_weights, mean_psnr, negatives, open_picture, pad_to, print_table, sample,
    save_picture, to_pil, train, upsample, write_file)

# ---- 1. The degradation's scores (read) -- S3Diff, Sec. 3.2 --------------------------


SCORES = ("blur", "noise")


class DegradationEstimator(nn.Module):
    """lq (B, 3, h, w) in [-1, 1] -> scores (B, 2) in (0, 1): blur, noise.

    Two independent branches, pooled to mean and log deviation of every channel.
    S3Diff learns them by ranking; here the true strengths are known (`degrade`), so
    they are learned by regression (not in the paper).
    """

    def __init__(self, cfg):
        super().__init__()
        n = cfg.estimator_width

        def branch():
            layers, ch = [], 3
            for width, stride in ((n, 1), (2 * n, 2), (4 * n, 2)):
                layers += [nn.Conv2d(ch, width, 3, stride, padding=1), nn.SiLU()]
                ch = width
            return nn.Sequential(*layers)
        self.branches = nn.ModuleList([branch(), branch()])
        self.heads = nn.ModuleList([nn.Linear(8 * n, 1) for _ in range(2)])

    def forward(self, lq):
        scores = []
        for branch, head in zip(self.branches, self.heads):
            f = branch(lq).flatten(2)                          # (B, C, n)
            spread = (f.var(2, unbiased=False) + 1e-6).log() / 2
            scores.append(head(torch.cat([f.mean(2), spread], dim=1)))
        return torch.sigmoid(torch.cat(scores, dim=1))         # (B, 2)


class ScoreEmbedding(nn.Module):
    """Scores and blocks -> one r x r matrix M per image and block.

    e_j = [sin(2 pi d_j W), cos(2 pi d_j W)], W ~ N(0, 1)^64 fixed; both e_j: 256
    numbers, Linear + ReLU; a learned embedding of 64 per block, Linear + ReLU; the
    two concatenated (320), Linear to r * r.  The last layer starts at the identity for
    all scores (not in the paper), so that training starts from a plain LoRA.
    """

    def __init__(self, blocks, rank):
        super().__init__()
        self.rank = rank
        self.register_buffer("frequencies", torch.randn(64))
        self.d_mlp = nn.Sequential(nn.Linear(256, 256), nn.ReLU())
        self.block_embedding = nn.Parameter(torch.randn(blocks, 64))
        self.block_mlp = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.to_matrix = nn.Linear(320, rank * rank)
        nn.init.zeros_(self.to_matrix.weight)
        self.to_matrix.bias.data.copy_(torch.eye(rank).flatten())

    def forward(self, scores):
        angle = 2 * math.pi * scores[:, :, None] * self.frequencies    # (B, 2, 64)
        e = torch.cat([angle.sin(), angle.cos()], dim=2).flatten(1)    # (B, 256)
        d, b = self.d_mlp(e), self.block_mlp(self.block_embedding)
        both = torch.cat([d[:, None].expand(-1, len(b), -1),
                          b[None].expand(len(d), -1, -1)], dim=2)      # (B, N, 320)
        return self.to_matrix(both).unflatten(2, (self.rank, self.rank))


# ---- 2. Degradation-guided LoRA (read) -- S3Diff, Sec. 3.2 ---------------------------


class LoRALayer(nn.Module):
    """y = W x + s B( M^T A x ), s = 8 / r, around a linear layer or a convolution.

    A ~ N(0, 1/r) has the layer's own kernel and stride, B = 0 is 1x1.  `matrix` is
    this forward's M, (B, r, r), one for each image; None stands for the identity.
    """

    def __init__(self, base, rank):
        super().__init__()
        self.base, self.scale, self.matrix, self.plain = base, 8 / rank, None, None
        if isinstance(base, nn.Conv2d):
            self.A = nn.Conv2d(base.in_channels, rank, base.kernel_size, base.stride,
                               base.padding, bias=False)
            self.B = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        else:
            self.A = nn.Linear(base.in_features, rank, bias=False)
            self.B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.A.weight, std=rank ** -0.5)
        nn.init.zeros_(self.B.weight)

    def forward(self, x):
        y = self.base(x)
        if self.plain is not None:                             # folded
            return y
        a = self.A(x)
        if self.matrix is not None:              # a: (B, r, h, w) or (B, n, r)
            rule = "bij,bihw->bjhw" if a.dim() == 4 else "bij,bni->bnj"
            a = torch.einsum(rule, self.matrix.to(a.dtype), a)
        return y + self.scale * self.B(a)

    @torch.no_grad()
    def fold(self):
        """W' = W + s B M^T A, for the one image that `matrix` belongs to."""
        a = self.A.weight.flatten(1)                           # (r, in * k * k)
        m_t_a = a if self.matrix is None else self.matrix[0].T.to(a) @ a
        delta = self.scale * self.B.weight.flatten(1) @ m_t_a
        self.plain = (self.base.weight,)          # a tuple: not a parameter of ours
        self.base.weight = nn.Parameter(
            self.base.weight + delta.view_as(self.base.weight), requires_grad=False)

    def unfold(self):
        """The stored W back in its place, exactly."""
        if self.plain is not None:
            (self.base.weight,), self.plain = self.plain, None


class DegradationLoRA(nn.Module):
    """Puts a `LoRALayer` around every target layer of a U-Net and sets their matrices.

    Targets: all attention projections, feed-forward layers and convolutions but
    conv_in and the time layers: 257 layers at full size.  All layers of a block share
    its M; the blocks are the down blocks, mid, the up blocks, and conv_out.
    """

    def __init__(self, unet, cfg):
        super().__init__()
        blocks = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
        blocks += ["mid_block"]
        blocks += [f"up_blocks.{i}" for i in range(len(unet.up_blocks))] + ["conv_out"]
        self.block_of = {}                       # layer name -> index of its block
        for name, layer in list(unet.named_modules()):
            if not isinstance(layer, (nn.Conv2d, nn.Linear)):
                continue
            if "time_emb" not in name and name != "conv_in":
                parent, _, child = name.rpartition(".")
                setattr(unet.get_submodule(parent), child,
                        LoRALayer(layer, cfg.lora_rank))
                self.block_of[name] = next(
                    i for i, b in enumerate(blocks) if name.startswith(b))
        self.embed = ScoreEmbedding(len(blocks), cfg.lora_rank)

    def set(self, unet, scores):
        """Give every layer its M for these scores (B, 2)."""
        matrices = self.embed(scores)                          # (B, blocks, r, r)
        for name, block in self.block_of.items():
            unet.get_submodule(name).matrix = matrices[:, block]


def lora_layers(module):
    """All `LoRALayer`s inside a module."""
    return [m for m in module.modules() if isinstance(m, LoRALayer)]


@torch.no_grad()
def fold(model, scores):
    """Merge a `Restorer`'s LoRA for one image's scores (1, 2): the plain U-Net runs.

    W' = W + s B M^T A costs one small product a layer, once an image.  Undo: `unfold`.
    """
    if len(scores) != 1:
        raise ValueError(f"fold takes the scores of one image, got {len(scores)}")
    unfold(model)
    model.lora.set(model.unet, scores)
    for layer in lora_layers(model.unet):
        layer.fold()


def unfold(model):
    """Restore the weights from before `fold`, exactly."""
    for layer in lora_layers(model.unet):
        layer.unfold()


# ---- 3. One restorer, two ends that change (read) -- GenDR, GenDR-Pix ----------------


class Restorer(nn.Module):
    """One step of the U-Net between two ends: forward(lq_up, scores, prompt) -> image.

    lq_up (B, 3, H, W) in [-1, 1], H and W multiples of 8, already at the output size;
    scores (B, 2); the result has lq_up's shape and is not clamped.  It predicts the
    clean picture.  `shortcut` maps the encoded input to the output space and is added
    to the U-Net's output (small presets; not in the paper); None at full size.
    """

    def __init__(self, end_in, unet, end_out, prompts=None, lora=None, shortcut=None):
        super().__init__()
        self.end_in, self.unet, self.end_out = end_in, unet, end_out
        self.prompts = prompts or Prompts(unet.cfg)
        self.lora, self.shortcut = lora, shortcut

    def step(self, h, scores, prompt=POSITIVE):
        """The U-Net at the last timestep, on what end_in gives; for end_out."""
        folded = any(layer.plain is not None for layer in lora_layers(self.unet))
        if self.lora is not None and not folded:
            self.lora.set(self.unet, scores)
        t = torch.full((len(h),), 999.0, device=h.device)
        out = self.unet(h, t, self.prompts(prompt, len(h)))
        return out if self.shortcut is None else out + self.shortcut(h)

    def forward(self, lq_up, scores, prompt=POSITIVE):
        h = self.end_in.encode(lq_up)                          # (B, C, H/8, W/8)
        return self.end_out.decode(self.step(h, scores, prompt))

    def copy(self):
        """An independent copy; a matrix M left from a training step stays behind."""
        for layer in lora_layers(self):
            layer.matrix = None
        return copy.deepcopy(self)


def share_copy(module):
    """A copy of a module tree around the same parameter tensors: no second weights."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def gendr_from_prior(prior, vae, cfg):
    """The one-step start: the frozen prior's first step at x_T = y0, plus LoRA.

    The prior's conv_in sees [s x_T, y0], s its input scale at T.  With x_T = y0 and no
    noise, W' = s W[:, :C] + W[:, C:] on y0 alone gives exactly the prior's first step.
    Trained: conv_in in full, LoRA, its embedding, the prompts.  Training the chain
    showed the prior noise in x_T; the fine-tuning makes up for its absence.
    """
    unet = share_copy(prior.unet).requires_grad_(False)
    c = vae.channels
    last = torch.tensor([cfg.steps])
    s = prior.chain.input_scale(last, prior.unet.conv_in.weight).item()
    conv_in = nn.Conv2d(c, unet.conv_in.out_channels, 3, padding=1)
    with torch.no_grad():
        weight = prior.unet.conv_in.weight
        conv_in.weight.copy_(s * weight[:, :c] + weight[:, c:])
        conv_in.bias.copy_(prior.unet.conv_in.bias)
    unet.conv_in = conv_in.to(weight.device)
    lora = DegradationLoRA(unet, cfg)
    prompts = copy.deepcopy(prior.prompts).requires_grad_(True)
    return Restorer(vae, unet, vae, prompts, lora,
                    nn.Identity() if cfg.shortcut else None).to(device())


def least_squares(x, y, ridge=1e-4):
    """The linear map (weight, bias) with || x weight + bias - y ||^2 + ridge least.

    Normal equations in float64: x (N, P), y (N, Q) -> (P, Q), (Q,).  The ridge is
    relative to the mean variance of x's columns.
    """
    x, y = x.double(), y.double()
    mx, my = x.mean(0), y.mean(0)
    x, y = x - mx, y - my
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, x.T @ y)
    return weight, my - mx @ weight


def pixels(x):
    """(B, C, h, w) -> one row a pixel: (B h w, C)."""
    return rearrange(x, "b c h w -> (b h w) c")


@torch.no_grad()
def fit_conv(conv, x, y):
    """Set a stride-1 convolution so that conv(x) is nearest to y: x, y (B, ., h, w)."""
    k = conv.kernel_size[0]
    patches = rearrange(F.unfold(x, k, padding=k // 2), "b c n -> (b n) c")
    weight, bias = least_squares(patches, pixels(y))
    conv.weight.copy_(weight.T.reshape(conv.weight.shape))
    conv.bias.copy_(bias)


def new_conv(old, in_channels=None, out_channels=None):
    """A 3x3 convolution in place of `old`, with other channels, at torch's start."""
    return nn.Conv2d(in_channels or old.in_channels, out_channels or old.out_channels,
                     3, padding=1).to(old.weight.device)


@torch.no_grad()
def pixel_input(teacher, cfg, lq_up=None):
    """Stage I's student: the teacher with pixel-unshuffle in place of its encoder.

    conv_in (192 channels) and the shortcut start by least squares on lq_up:
    conv_in'(unshuffle(x)) near conv_in(encode(x)), shortcut'(unshuffle(x)) near
    shortcut(encode(x)).  Not in the paper; cfg.least_squares off: torch's start.
    Without lq_up only the structure is built, for weights to be loaded into.
    """
    student = teacher.copy()
    end = student.end_in = PixelShuffle(teacher.end_in.factor)
    student.end_out = teacher.end_out                          # the same frozen VAE
    student.unet.conv_in = new_conv(teacher.unet.conv_in, in_channels=end.channels)
    if cfg.shortcut:
        student.shortcut = nn.Conv2d(end.channels, teacher.end_out.channels, 1)
    student.to(device())
    if lq_up is not None and cfg.least_squares:
        x, z = end.encode(lq_up), teacher.end_in.encode(lq_up)
        fit_conv(student.unet.conv_in, x, teacher.unet.conv_in(z))
        if cfg.shortcut:
            fit_conv(student.shortcut, x, teacher.shortcut(z))
    return trainable(student)


def trainable(student):
    """All of a student is trained, but for the VAE that it shares with its teacher."""
    student.requires_grad_(True)
    if not isinstance(student.end_out, PixelShuffle):
        student.end_out.requires_grad_(False)
    return student


@torch.no_grad()
def pixel_output(teacher, cfg, rows=None):
    """Stage II's student: pixel-shuffle in place of the decoder, 192 channels out.

    conv_out starts by least squares on the teacher's own features: it maps them to the
    teacher's unshuffled picture, less the shortcut (the identity on pixels).
    rows: {"lq_up", "estimate", "y_tea"}; without them only the structure is built.
    """
    student = teacher.copy()
    end = student.end_out = PixelShuffle(teacher.end_out.factor)
    conv = new_conv(teacher.unet.conv_out.base, out_channels=end.channels)
    student.shortcut = nn.Identity() if cfg.shortcut else None
    if rows is not None and cfg.least_squares:
        h, seen = student.end_in.encode(rows["lq_up"]), []
        hook = teacher.unet.conv_out.register_forward_pre_hook(
            lambda _, x: seen.append(x[0]))
        teacher.step(h, rows["estimate"])
        hook.remove()
        fit_conv(conv, seen[0], end.encode(rows["y_tea"]) - (h if cfg.shortcut else 0))
    student.unet.conv_out = LoRALayer(conv, cfg.lora_rank)
    return trainable(student.to(device()))


# ---- 4. What the students lose sleep over (read) -- GenDR-Pix, Sec. 3.3 --------------


def rand_pad(x, ph, pw):
    """randpad(y) = pad(y, [ph, 8 - ph, pw, 8 - pw]), ph, pw in 0 .. 7, reflecting.

    x (B, C, H, W) -> (B, C, H + 8, W + 8); the content moves to phase (ph, pw) of the
    8x8 grid, so that a discriminator cannot latch onto fixed patches.  One draw serves
    fake and real; mode and pairing are not in the paper.
    """
    return F.pad(x, (pw, 8 - pw, ph, 8 - ph), mode="reflect")


@lru_cache(maxsize=8)
def fourier_mask(h, w, factor=8):
    """M (h, w) over fft2's bins: 1 near the lattice (k h/8, l w/8) but (0, 0), else 0.

    One wrong weight of the last layer repeats in every 8x8 patch: its energy sits
    within one bin of those points.  Radius 1 and the exception are not in the paper.
    """
    def near(n):
        """(n, factor): is bin u within 1 of lattice point k, around the circle?"""
        point = (torch.arange(factor) * n / factor).round()
        distance = (torch.arange(n)[:, None] - point).abs()
        return torch.minimum(distance, n - distance) <= 1
    rows, columns = near(h), near(w)
    mask = rows.any(1)[:, None] & columns.any(1)
    return (mask & ~(rows[:, :1] & columns[:, 0])).float()     # not around (0, 0)


def masked_fourier_loss(y_student, y_teacher, factor=8):
    """L_F = || M (|F y_stu| - |F y_tea|) ||_1, the mean over M's bins.

    F is the unitary fft2 of each channel, so that a bin does not grow with the picture;
    this scaling is not in the paper.  Inputs (B, C, H, W) -> a scalar.
    """
    mask = fourier_mask(*y_student.shape[2:], factor).to(y_student.device)
    a, b = (torch.fft.fft2(y.float(), norm="ortho").abs() for y in
            (y_student, y_teacher))
    return (mask * (a - b)).abs().sum() / (mask.sum() * len(a) * a.shape[1])


def lattice_energy(y, factor=8):
    """Share of the energy (constant left out) in L_F's windows: (B,), from images."""
    power = torch.fft.fft2(y.float()).abs().square()
    power[:, :, 0, 0] = 0
    mask = fourier_mask(*y.shape[2:], factor).to(y.device)
    return (mask * power).sum((1, 2, 3)) / power.sum((1, 2, 3))


class Discriminator(nn.Module):
    """D: small heads on the frozen features of the previous stage's restorer.

    forward(h): what that restorer's U-Net eats -> one map of logits a level.  Its LoRA
    is folded at scores (0, 0), a clean picture.  The paper leaves the heads open: ours
    are GroupNorm and two 1x1 convolutions on the end of every level of the first half.
    """

    def __init__(self, restorer, cfg):
        super().__init__()
        restorer = restorer.copy().requires_grad_(False)
        fold(restorer, torch.zeros(1, 2, device=device()))
        self.backbone = [restorer]       # in a list: neither trained nor stored with D
        self.heads = nn.ModuleList([
            nn.Sequential(nn.GroupNorm(cfg.groups, n), nn.Conv2d(n, 64, 1),
                          nn.LeakyReLU(0.2), nn.Conv2d(64, 1, 1))
            for n in (*cfg.unet_widths, cfg.unet_widths[-1])]).to(device())
        self.ends = [cfg.unet_blocks * (i + 1) + i for i in range(len(cfg.unet_widths))]

    def features(self, h):
        """The last feature map of each down block, and the middle's."""
        g = self.backbone[0]
        t = torch.full((len(h),), 999.0, device=h.device)
        middle, skips, _ = g.unet.encode(h, t, g.prompts(POSITIVE, len(h)))
        return [*(skips[i] for i in self.ends), middle]

    def judge(self, features):
        """Logits of every level, all positions in one row: (B, n)."""
        return torch.cat([head(f).flatten(1) for head, f in
                          zip(self.heads, features)], dim=1)

    def forward(self, h):
        return self.judge(self.features(h))


@contextmanager
def frozen(module):
    """Inside, gradients pass through `module` but none stay in its parameters."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


class Adversary:
    """The two halves of the game: softplus(-D(fake)) for G, and D's own loss.

    D's: softplus(D(fake)) + softplus(-D(real)).  The generator's turn keeps the fake's
    features for D's turn, detached: one pass through the frozen backbone serves both.
    """

    def __init__(self, discriminator):
        self.discriminator, self.fake = discriminator, None

    def generator_loss(self, fake):
        """softplus(-D(fake)), its gradient flowing to `fake` only."""
        with frozen(self.discriminator):
            features = self.discriminator.features(fake)
            self.fake = [f.detach() for f in features]
            return F.softplus(-self.discriminator.judge(features)).mean()

    def discriminator_loss(self, real):
        """softplus(D(fake)) + softplus(-D(real)) on the generator's last fake."""
        with torch.no_grad():
            features = self.discriminator.features(real)
        fake, real = (self.discriminator.judge(f) for f in (self.fake, features))
        return F.softplus(fake).mean() + F.softplus(-real).mean()


# ---- 5. The stages (read) -- who teaches, who criticises, which losses ---------------


def train_estimator(run, estimator, pool):
    """The two scores by regression on the strengths that `degrade` knows."""
    def losses(batch, rng):
        return {"scores": F.mse_loss(estimator(batch["lq"]), batch["scores"])}
    turns = [Turn("estimator", estimator, losses,
                  run.cfg.estimator_learning_rate)]
    train(run, "estimator", turns, pool, run.cfg.estimator_steps)


def train_gendr(run, student, pool, watch):
    """Chapter 2: regression to the HQ latent, with online negatives.

    Teacher: the data.  GenDR's score distillation (CiD) joins as one more term of
    `losses`; it is not here yet.
    """
    cfg = run.cfg

    def losses(batch, rng):
        prompt, target = negatives(batch, "z_hq", "z_lq", rng, cfg)
        z = student.step(batch["z_lq"], batch["estimate"], prompt)
        return {"mse": F.mse_loss(z, target)}
    train(run, "gendr", [Turn("generator", student, losses, cfg.learning_rate)], pool,
          cfg.gendr_steps, watch)


def train_adc(run, teacher, student, pool, watch):
    """Stage I: L_G1 = || z_tea - z_stu ||_1 + l1 softplus(-D(z_stu)).

    Teacher: GenDR's latents (in the pool).  Critic: GenDR's features.  Real: HQ.
    Negative samples count in the reconstruction losses as S3Diff has it, and their
    outputs go to D like all others.  l1 is printed for stage II only; we reuse it.
    """
    cfg, critic = run.cfg, Discriminator(teacher, run.cfg)
    adversary = Adversary(critic)

    def generator(batch, rng):
        prompt, target = negatives(batch, "z_tea", "z_lq", rng, cfg)
        h = student.end_in.encode(batch["lq_up"])
        z = student.step(h, batch["estimate"], prompt)
        return {"l1": F.l1_loss(z, target),
                "adv": cfg.lambda_adv * adversary.generator_loss(z)}

    def discriminator(batch, rng):
        return {"d": adversary.discriminator_loss(batch["z_hq"])}
    # The generator plays first: D's turn judges the fake that it left in `adversary`.
    turns = [Turn("generator", student, generator, cfg.student_learning_rate),
             Turn("discriminator", critic, discriminator, cfg.critic_learning_rate)]
    train(run, "adc", turns, pool, cfg.adc_steps, watch)


def train_pix(run, teacher, student, pool, lpips, watch):
    """Stage II: L_G2 = ||y_tea - y_stu||_1 + l1 softplus(-D(y_stu)) + l2 L_P + l3 L_F.

    Teacher: GenDR's pictures (in the pool).  Critic: GenDR-Adc's features, which eats
    pictures through pixel-unshuffle; fake and real take the same random padding.
    L_P is LPIPS (the paper does not say which).  Weights 0.05 / 1 / 0.1.
    """
    cfg, critic = run.cfg, Discriminator(teacher, run.cfg)
    adversary, shift = Adversary(critic), {}      # shift: one phase for both turns

    def eat(y):
        return teacher.end_in.encode(rand_pad(y, *shift["phase"]))

    def generator(batch, rng):
        shift["phase"] = torch.randint(8, (2,), generator=rng).tolist()
        prompt, target = negatives(batch, "y_tea", "lq_up", rng, cfg)
        y = student(batch["lq_up"], batch["estimate"], prompt)
        return {"l1": F.l1_loss(y, target),
                "adv": cfg.lambda_adv * adversary.generator_loss(eat(y)),
                "lpips": cfg.lambda_lpips * lpips(y, target).mean(),
                "fourier": cfg.lambda_fourier * masked_fourier_loss(y, target)}

    def discriminator(batch, rng):
        return {"d": adversary.discriminator_loss(eat(batch["hq"]))}
    turns = [Turn("generator", student, generator, cfg.student_learning_rate),
             Turn("discriminator", critic, discriminator, cfg.critic_learning_rate)]
    train(run, "pix", turns, pool, cfg.pix_steps, watch)


# ---- 6. What a user calls (read) -- guidance, PadCFG, restore ------------------------


def pad_cfg(restorer, x, scores, weight, pads=((4, 4), (3, 3))):
    """y = w G(pad(x, [4,4,4,4]), c_pos) + (1 - w) G(pad(x, [3,5,3,5]), c_neg).

    Each output is cropped by its own padding before mixing.  Plain guidance amplifies
    the 8x8 grid in pixel space; two phases of it also make a self-ensemble at no extra
    pass.  x (B, 3, H, W); pads: (top, left) of the two branches, 8 in all a side.
    """
    mixed, (h, w) = 0, x.shape[2:]
    for prompt, share, (top, left) in zip((POSITIVE, NEGATIVE), (weight, 1 - weight),
                                          pads):
        y = restorer(rand_pad(x, top, left), scores, prompt)
        mixed = mixed + share * y[:, :, top:top + h, left:left + w]
    return mixed


def guided(restorer, x, scores, weight):
    """out = neg + w (pos - neg): two passes; PadCFG where the output end is pixels.

    With a VAE behind it the U-Net's latents are mixed (S3Diff), and decoded once.
    """
    if isinstance(restorer.end_out, PixelShuffle):
        return pad_cfg(restorer, x, scores, weight)
    h = restorer.end_in.encode(x)
    negative = restorer.step(h, scores, NEGATIVE)
    return restorer.end_out.decode(
        negative + weight * (restorer.step(h, scores, POSITIVE) - negative))


@torch.no_grad()
def restore(restorer, estimator, lq, scale=4, weight=1.0, tile=0, scores=None):
    """lq (1, 3, h, w) in [-1, 1] -> (1, 3, s h, s w): what a user calls.

    Estimate the scores on lq itself, upsample, fold the LoRA for this image, then run
    one pass (weight 1) or two (guidance).  tile: side of the squares that are restored
    one by one, in output pixels and with 64 of overlap; 0 restores in one piece.
    """
    scores = estimator(lq) if scores is None else scores
    x = upsample(lq, scale)
    if restorer.lora is not None:
        fold(restorer, scores)
    try:
        def run(piece):
            full = pad_to(piece, 8)
            y = (restorer(full, scores) if weight == 1
                 else guided(restorer, full, scores, weight))
            return y[:, :, :piece.shape[2], :piece.shape[3]].float()
        y = tiled(run, x, tile) if tile else run(x)
    finally:
        unfold(restorer)
    return y.clamp(-1, 1)


def tiled(run, x, tile, overlap=64):
    """run() on overlapping squares of x, cross-faded with a linear ramp."""
    h, w = x.shape[2:]
    tile = max(tile // 8 * 8, 2 * overlap)
    total, weights = torch.zeros_like(x), torch.zeros_like(x[:, :1])
    stride = tile - overlap
    starts = [range(0, max(n - overlap, 1), stride) for n in (h, w)]
    for top in starts[0]:
        for left in starts[1]:
            piece = x[:, :, top:top + tile, left:left + tile]
            n, m = piece.shape[2:]
            ramps = [torch.minimum(torch.arange(k) + 1, torch.arange(k, 0, -1))
                     .clamp(max=overlap).to(x) for k in (n, m)]
            fade = ramps[0][:, None] * ramps[1]
            total[:, :, top:top + n, left:left + m] += fade * run(piece)
            weights[:, :, top:top + n, left:left + m] += fade
    return total / weights


# ---- 7. Time, memory, operations (skim) ----------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Peak bytes of tensors alive at once that were made inside the `with` block.

    Counts every storage an operation returns until it is freed: activations, not
    weights, and not what a kernel takes for itself.
    """

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen, self.outside = 0, 0, set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for storage in self.storages((args, kwargs)):
            if id(storage) not in self.seen:                   # a weight, or the input
                self.outside[id(storage)] = storage
        out = func(*args, **(kwargs or {}))
        for storage in self.storages(out):
            self.track(storage)
        return out

    @staticmethod
    def storages(tree):
        """The storages of all tensors in nested tuples, lists and dictionaries."""
        return [x.untyped_storage() for x in tree_leaves(tree)
                if isinstance(x, torch.Tensor)]

    def track(self, storage):
        """Count a storage from its first appearance until it is freed."""
        key, size = id(storage), storage.nbytes()
        if key not in self.seen and key not in self.outside:
            self.seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        """A storage was freed."""
        self.seen.discard(key)
        self.now -= size


@torch.no_grad()
def measure(function, repeats=5):
    """(milliseconds, peak bytes) of function(): median of `repeats` after a warm-up.

    On CUDA the peak is the allocator's, above what was allocated before; on the CPU
    `LiveBytes`.
    """
    cuda = device().type == "cuda"

    def timed():
        start = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)
    timed()
    milliseconds = sorted(timed() for _ in range(repeats))[repeats // 2]
    if cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return milliseconds, torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        function()
    return milliseconds, live.peak


def parameters_used(model, x, scores):
    """How many parameters a forward pass touches: a folded LoRA's own do not count."""
    used, hooks = {}, []

    def note(module, *_):
        used.update({id(p): p.numel() for p in module.parameters(recurse=False)})
    for module in model.modules():
        hooks.append(module.register_forward_hook(note))
    model(x, scores)
    for hook in hooks:
        hook.remove()
    return sum(used.values())


@torch.no_grad()
def benchmark(models, size):
    """{name: {"ms", "bytes", "parameters"}} of one and two passes at size x size.

    The LoRA is folded, as in `restore`; fp32.  models: GenDR, GenDR-Adc, GenDR-Pix.
    """
    x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    x, scores, rows = (2 * x - 1).to(device()), torch.zeros(1, 2, device=device()), {}
    for name, model in models.items():
        fold(model, scores)
        parameters = parameters_used(model, x, scores)
        for label, weight in ((name, 1), (name + " guided", 1.07)):    # any w but 1
            def run():
                return model(x, scores) if weight == 1 else guided(
                    model, x, scores, weight)
            ms, peak = measure(run)
            rows[label] = {"ms": ms, "bytes": peak, "parameters": parameters}
        unfold(model)
    return rows


def print_benchmark(rows, size):
    """The table of `benchmark`, with ratios to GenDR at the same number of passes."""
    print(f"\n{size}x{size} output, {device()}, {torch.get_num_threads()} threads; "
          "LoRA folded; ratios to GenDR, like for like")
    print(f"{'':18s} {'parameters':>11s} {'ms':>9s} {'peak MB':>9s} {'faster':>8s} "
          f"{'memory':>8s}")
    for name, row in rows.items():
        base = rows["GenDR guided" if "guided" in name else "GenDR"]
        print(f"{name:18s} {row['parameters'] / 1e6:9.2f} M {row['ms']:9.1f} "
              f"{row['bytes'] / 1e6:9.1f} {base['ms'] / row['ms']:7.2f}x "
              f"{row['bytes'] / base['bytes'] - 1:+8.0%}")


# ---- 8. Evaluation and report (skim) -------------------------------------------------


@torch.no_grad()
def rank_correlations(estimator, pairs, cfg, draws=8):
    """{"blur", "noise"}: Spearman's, estimate against truth, on new degradations.

    Every held-out photo is degraded `draws` times with seeds of their own.
    """
    true, guess = [], []
    for i in range(draws * len(pairs)):
        rng = torch.Generator().manual_seed(20_000 + i)
        lq, scores = degrade(pairs[i % len(pairs)].hq, cfg, rng)
        true.append(scores)
        guess.append(estimator(lq.to(device())).cpu())
    true, guess = torch.cat(true), torch.cat(guess)
    return {n: spearman(true[:, i], guess[:, i]) for i, n in enumerate(SCORES)}


def spearman(a, b):
    """Rank correlation of two (N,) tensors; ties share their mean rank."""
    ranks = [(x < x[:, None]).sum(1) + 0.5 * (x == x[:, None]).sum(1) for x in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


@dataclass(frozen=True)
class Check:
    """One row of the final table: a number, the floor PASS needs, the bar we aim at."""
    name: str
    value: float
    floor: float                         # nan: no floor
    bar: float
    unit: str = ""

    def reached(self, limit):
        """All limits are lower limits; nan asks for nothing."""
        return math.isnan(limit) or self.value >= limit


def checks(table, bench, lattice):
    """The papers' claims as numbers of this run: a list of `Check`s.

    GenDR-Pix prints 2.8x and 60 % for PadCFG against GenDR, which is guided too; here
    both are asked like for like, with guidance (a bar) and without (also a floor).
    """
    nan, rows, t = math.nan, [], table
    rows.append(Check("VAE reconstruction", t["VAE"]["psnr"], 28, 30, "dB"))

    def versus(name, base, floor, bar):
        rows.append(Check(f"{name}, PSNR over {base}",
                          t[name]["psnr"] - t[base]["psnr"], floor, bar, "dB"))

    def lpips(name, base, floor, bar):
        change = 100 * (1 - t[name]["lpips"] / t[base]["lpips"])
        rows.append(Check(f"{name}, LPIPS lower than {base} by", change, floor, bar,
                          "%"))
    tiny = 1e-9                          # "better" is strictly more than 0
    versus("ResShift", "bicubic", tiny, tiny)
    lpips("ResShift", "bicubic", nan, tiny)
    versus("GenDR", "bicubic", 0.3, 0.7)
    lpips("GenDR", "bicubic", tiny, tiny)
    for name in ("GenDR-Adc", "GenDR-Pix"):
        versus(name, "bicubic", tiny, tiny)
        versus(name, "GenDR", -0.3, -0.3)
        lpips(name, "GenDR", nan, -5)
    for suffix, floor in (("", True), (" guided", False)):
        a, b = bench["GenDR" + suffix], bench["GenDR-Pix" + suffix]
        rows.append(Check(f"Pix{suffix} faster than GenDR{suffix}", a["ms"] / b["ms"],
                          2.8 if floor else nan, 2.8, "x"))
        rows.append(Check(f"Pix{suffix} peak memory below GenDR{suffix}",
                          100 * (1 - b["bytes"] / a["bytes"]), 60 if floor else nan, 60,
                          "%"))
    rows.append(Check("8x8 lattice energy, HQ over Pix", lattice["HQ"] / lattice["Pix"],
                      nan, 1, "x"))
    return rows


def print_checks(rows):
    """Every row with its number, its floor and its bar; True if all floors hold."""
    def limit(value):
        return "" if math.isnan(value) else f">= {value:.1f}"
    print(f"\n{'claim':44s} {'measured':>11s}  {'floor':>8s}       {'bar':>8s}")
    for r in rows:
        marks = ["" if math.isnan(x) else "ok" if r.reached(x) else "MISSED"
                 for x in (r.floor, r.bar)]
        print(f"{r.name:44s} {r.value:8.3f} {r.unit:2s}  {limit(r.floor):>8s} "
              f"{marks[0]:6s}{limit(r.bar):>8s} {marks[1]}")
    return all(r.reached(r.floor) for r in rows)


def draw_report(table, pairs, lpips_name, file, crop=112, rows=6):
    """report.png: a row a photo, a column a method, PSNR / LPIPS below each."""
    from matplotlib.figure import Figure
    columns = ["LQ", "bicubic", "ResShift", "GenDR", "GenDR-Adc", "GenDR-Pix", "HQ"]
    pairs = pairs[:rows]
    figure = Figure(figsize=(1.75 * len(columns), 2.0 * len(pairs) + 0.5), dpi=100)
    axes = figure.subplots(len(pairs), len(columns), squeeze=False)
    for i, pair in enumerate(pairs):
        scale = pair.hq.shape[2] // pair.lq.shape[2]
        top, left = (max(0, n - crop) // 2 // scale * scale
                     for n in pair.hq.shape[2:])
        for axis, name in zip(axes[i], columns):
            if name == "LQ":
                picture, label = F.interpolate(pair.lq, scale_factor=scale), pair.name
            elif name == "HQ":
                picture, label = pair.hq, "PSNR / LPIPS"
            else:
                picture, each = table[name]["pictures"][i], table[name]["each"][i]
                label = f"{each['psnr']:.2f} / {each['lpips']:.3f}"
            cut = picture[:, :, top:top + crop, left:left + crop]
            axis.imshow(to_pil(cut), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(label, fontsize=8)
            if i == 0:
                axis.set_title(name, fontsize=10)
    figure.suptitle(f"Held-out photos, x{scale}, PSNR (dB) / {lpips_name}", fontsize=10)
    figure.tight_layout()
    write_file(file, lambda p: figure.savefig(p, format="png"))


# ---- 9. All chapters, one after the other (read) -------------------------------------


@dataclass
class Models:
    """What a finished run holds."""
    end: object
    prior: nn.Module
    estimator: nn.Module
    gendr: Restorer
    adc: Restorer
    pix: Restorer


def train_all(run, pairs, lpips):
    """Chapters 1 to 4: train what is missing, resume what was interrupted."""
    cfg, pool = run.cfg, Pool(run.cfg)
    end, prior = chapter_one(run, pool, pairs)
    estimator = chapter(run, "estimator", lambda: DegradationEstimator(cfg),
                        lambda m: train_estimator(run, m, pool))
    pool.add("estimate", lambda rows: estimator(rows["lq"]))

    def watch(model):
        return {"psnr": mean_psnr(
            lambda p: restore(model, estimator, p.lq, cfg.scale), pairs),
            "bicubic": mean_psnr(lambda p: upsample(p.lq, cfg.scale), pairs)}

    def stage(name, build, teach):
        return chapter(run, name, build, lambda m: teach(m, lambda: watch(m)))

    def some():
        """Rows for a least-squares start: 128 crops of 128, fewer larger ones."""
        most = max(1, 128 ** 3 // cfg.crop ** 2)
        return pool.rows(torch.arange(min(len(pool), most)))
    gendr = stage("gendr", lambda: gendr_from_prior(prior, end, cfg),
                  lambda m, w: train_gendr(run, m, pool, w))
    pool.add("z_tea", lambda rows: gendr.step(rows["z_lq"], rows["estimate"]))
    adc = stage("adc", lambda: pixel_input(gendr, cfg, some()["lq_up"]),
                lambda m, w: train_adc(run, gendr, m, pool, w))
    pool.add("y_tea", lambda rows: end.decode(rows["z_tea"]))
    pix = stage("pix", lambda: pixel_output(adc, cfg, some()),
                lambda m, w: train_pix(run, adc, m, pool, lpips, w))
    return Models(end, prior, estimator, gendr, adc, pix)


def load_all(folder):
    """(cfg, Models) of a finished run."""
    cfg, end, prior = load_chapter_one(folder)

    def load(name, model):
        model = load_weights(model.to(device()), Path(folder) / f"{name}.safetensors")
        return model.requires_grad_(False).eval()
    estimator = load("estimator", DegradationEstimator(cfg))
    gendr = load("gendr", gendr_from_prior(prior, end, cfg))
    adc = load("adc", pixel_input(gendr, cfg))
    pix = load("pix", pixel_output(adc, cfg))
    return cfg, Models(end, prior, estimator, gendr, adc, pix)


def methods_of(m, cfg):
    """{name: function of a `Held` pair -> picture}: every row of the first table."""
    def one(model, weight=1.0):
        return lambda p: restore(model, m.estimator, p.lq, cfg.scale, weight)

    def autoencode(p):
        with torch.no_grad():
            y = m.end.decode(m.end.encode(pad_to(p.hq, m.end.factor)))
        return y[:, :, :p.hq.shape[2], :p.hq.shape[3]]
    return {
        "bicubic": lambda p: upsample(p.lq, cfg.scale),
        "VAE": autoencode,
        "ResShift": lambda p: sample(m.prior, m.end, p.lq, cfg),
        "GenDR": one(m.gendr), "GenDR-Adc": one(m.adc), "GenDR-Pix": one(m.pix),
        "GenDR guided": one(m.gendr, cfg.guidance),
        "GenDR-Pix PadCFG": one(m.pix, cfg.guidance)}


def report(folder, cfg, models, pairs, lpips, size=512):
    """Evaluate, measure, draw; write metrics.json and report.png; True if PASS."""
    m, table = models, evaluate(methods_of(models, cfg), pairs, lpips)
    print_table(table, lpips.name)
    ranks = rank_correlations(m.estimator, pairs, cfg)
    print("\nestimator, rank correlation with the truth: "
          + ", ".join(f"{k} {v:.2f}" for k, v in ranks.items()))
    bench = benchmark({"GenDR": m.gendr, "GenDR-Adc": m.adc, "GenDR-Pix": m.pix}, size)
    print_benchmark(bench, size)
    lattice = {"HQ": [lattice_energy(p.hq) for p in pairs],
               "Pix": [lattice_energy(y) for y in table["GenDR-Pix"]["pictures"]]}
    lattice = {k: torch.cat(v).mean().item() for k, v in lattice.items()}
    rows = checks(table, bench, lattice)
    passed = print_checks(rows)
    metrics = {"lpips": lpips.name, "device": str(device()), "torch": torch.__version__,
               "seed": cfg.seed, "estimator": ranks, "lattice": lattice,
               "benchmark": bench,
               "table": {k: {n: v for n, v in row.items() if n != "pictures"}
                         for k, row in table.items()},
               "checks": [{"name": r.name, "value": r.value, "unit": r.unit,
                           "floor": r.reached(r.floor), "bar": r.reached(r.bar)}
                          for r in rows]}
    write_file(Path(folder) / "metrics.json", json.dumps(metrics, indent=1))
    draw_report(table, pairs, lpips.name, Path(folder) / "report.png")
    return passed


# ---- 10. Command line (skim) ---------------------------------------------------------


def restore_file(args, folder):
    """--input to --output; an alpha channel is resized beside the picture."""
    check_output(args.output)
    cfg, m = load_all(folder)
    passes = args.passes or (2 if args.guidance else 1)
    picture = open_picture(args.input)
    lq = from_pil(picture).to(device())
    alpha = picture.getchannel("A") if picture.mode == "RGBA" else None
    weight = 1.0 if passes == 1 else args.guidance or cfg.guidance
    y = restore(m.pix, m.estimator, lq, cfg.scale, weight, args.tile)
    save_picture(y, args.output, alpha)
    print(f"{args.output}: {y.shape[3]}x{y.shape[2]}, passes: {passes}")


def main():
    """python gendr_pix.py: train, evaluate, measure, or restore one picture."""
    parser = config_parser(__doc__)
    parser.add_argument("--train", action="store_true", help="all chapters, and --eval")
    parser.add_argument("--eval", action="store_true", help="the table of a run")
    parser.add_argument("--data", help="--eval: photos, or a folder with lq/ and hq/")
    parser.add_argument("--bench", action="store_true", help="time and memory of a run")
    parser.add_argument("--size", type=int, default=512, help="--bench: output pixels")
    parser.add_argument("--input", help="a picture to restore")
    parser.add_argument("--output", default="up.png", help="where to write it")
    parser.add_argument("--tile", type=int, default=0,
                        help="restore in squares of this many output pixels")
    parser.add_argument("--passes", type=int, choices=(1, 2),
                        help="2: PadCFG, with the weight --guidance")
    args = parser.parse_args()
    folder = args.run or f"runs/{args.preset}"
    if args.size < 16 or args.size % 8:
        raise UserError("--size is a multiple of 8, 16 or more")
    if args.input:
        restore_file(args, folder)
        return 0
    if args.bench:
        _, m = load_all(folder)
        print_benchmark(benchmark({"GenDR": m.gendr, "GenDR-Adc": m.adc,
                                   "GenDR-Pix": m.pix}, args.size), args.size)
        return 0
    if not (args.train or args.eval):
        parser.error("nothing to do: --train, --eval, --bench, or --input")
    started = time.time()
    if args.eval:
        cfg, models = load_all(folder)
        pairs = held_out(cfg, args.data)
        lpips = Perceptual(cfg.lpips_net).to(device())
        if args.data:
            print_table(evaluate(methods_of(models, cfg), pairs, lpips), lpips.name)
            return 0
    else:
        cfg = config_from(args)
        check_config(cfg)
        if cfg.space != "latent":
            raise UserError("GenDR starts in latent space: --space latent")
        pairs, run = held_out(cfg), Run(folder, cfg)
        lpips = Perceptual(cfg.lpips_net).to(device())
        models = train_all(run, pairs, lpips)
    passed = report(folder, cfg, models, pairs, lpips, args.size)
    minutes = (time.time() - started) / 60
    print(f"\n{'PASS' if passed else 'FAIL'}: {folder}, {minutes:.1f} minutes on "
          f"{device()}, {torch.get_num_threads()} threads, seed {cfg.seed}")
    return 0 if passed else 1


if __name__ == "__main__":
    command_line(main)
