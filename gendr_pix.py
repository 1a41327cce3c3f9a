"""GenDR-Pix: one-step super-resolution without a VAE, from its ancestors up.

Chapter 2 turns the T-step prior of `resshift.py` into a one-step restorer (GenDR) with
S3Diff's degradation-guided LoRA and GenDR's score distillation (CiD); chapter 3
replaces its VAE encoder by pixel-unshuffle (GenDR-Adc), chapter 4 its decoder by
pixel-shuffle (GenDR-Pix).  Each chapter's model is the next one's starting point and
its critic; the prior teaches GenDR, and GenDR the last two.

Papers: GenDR-Pix, arXiv 2602.10630; GenDR, 2503.06790; S3Diff, 2409.17058;
        ResShift, 2307.12348; SiD (score identity distillation), 2404.04057.

    python gendr_pix.py --train --tiny              all chapters; 10 minutes, 2 cores
    python gendr_pix.py --tiny --input lq.png --output up.png
    python gendr_pix.py --tiny --eval               the table once more
    python gendr_pix.py --ablate --tiny             GenDR's variants, 3 seeds
    python gendr_pix.py --bench --full              counts, time, memory at full size

The first ends in:  PASS: runs/tiny, 10.2 minutes on cpu, 2 threads, seed 0

    restore(lq):  end_in(lq)  ->  U-Net, one step  ->  end_out
    GenDR         VAE encoder                          VAE decoder
    GenDR-Adc     pixel-unshuffle x8                   VAE decoder
    GenDR-Pix     pixel-unshuffle x8                   pixel-shuffle x8

Symbols: B batch, C channels, H W full resolution, h w latent resolution, f = 8;
         r LoRA rank, D discriminator, G generator; "not in the paper": our choices.
Ranges:  images are float in [-1, 1] inside, [0, 1] in metrics, uint8 in files.
"""
import copy
import dataclasses
import json
import math
import time
import weakref
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from resshift import (
    NEGATIVE, POSITIVE, VAE, Config, Perceptual, PixelShuffle, Pool, Prompts, ResShift,
    Run, Turn, UserError, autocast, batch_noise, blur, chapter, chapter_one,
    check_config, check_output, command_line, config_from, config_parser, degrade,
    device, evaluate, from_pil, frozen, gaussian_kernel, given_numbers, held_out,
    load_chapter_one, load_weights, luma, mean_lpips, mean_psnr, negatives, noise_like,
    open_picture, pad_to, per_sample, place, print_config, print_table, prior_turns,
    sample, save_picture, to_pil, to_unit, train, train_prior, upsample, world,
    write_file)

# ---- 1. The degradation's scores (read) -- S3Diff, Sec. 3.2 --------------------------


SCORES = ("blur", "noise")


class DegradationEstimator(nn.Module):
    """lq (B, 3, h, w) in [-1, 1] -> scores (B, 2) in (0, 1): blur, noise.

    Two independent branches.  Each channel is pooled to its mean, its log deviation
    and three quantiles: noise shows in the calmest places of a picture, where no
    texture hides it.  S3Diff learns the scores by ranking; here the true strengths are
    known (`degrade`), so they are learned by regression.  Neither is in the paper.
    """
    QUANTILES = (0.1, 0.5, 0.9)

    def __init__(self, cfg):
        super().__init__()
        n, pooled = cfg.estimator_width, 2 + len(self.QUANTILES)

        def branch():
            layers, ch = [], 3
            for width, stride in ((n, 1), (2 * n, 2), (4 * n, 2)):
                layers += [nn.Conv2d(ch, width, 3, stride, padding=1), nn.SiLU()]
                ch = width
            return nn.Sequential(*layers)
        self.branches = nn.ModuleList([branch(), branch()])
        self.heads = nn.ModuleList([
            nn.Sequential(nn.Linear(4 * n * pooled, 64), nn.SiLU(), nn.Linear(64, 1))
            for _ in range(2)])

    def forward(self, lq):
        scores = []
        for branch, head in zip(self.branches, self.heads):
            f = branch(lq).flatten(2).float()                  # (B, C, n)
            spread = (f.var(2, unbiased=False) + 1e-6).log() / 2
            at = [round(q * (f.shape[2] - 1)) for q in self.QUANTILES]
            quantiles = f.sort(2).values[:, :, at].flatten(1)  # (B, 3 C)
            scores.append(head(torch.cat([f.mean(2), spread, quantiles], dim=1)))
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
        a, w = self.A.weight.flatten(1), self.base.weight      # a: (r, in * k * k)
        m_t_a = a if self.matrix is None else self.matrix[0].T.to(a) @ a
        folded = torch.addmm(w.flatten(1), self.B.weight.flatten(1), m_t_a,
                             alpha=self.scale)
        self.plain = (w,)                         # a tuple: not a parameter of ours
        self.base.weight = nn.Parameter(folded.view_as(w), requires_grad=False)

    def unfold(self):
        """The stored W back in its place, exactly."""
        if self.plain is not None:
            (self.base.weight,), self.plain = self.plain, None


def add_lora(network, rank):
    """Put a `LoRALayer` around every target layer of a network; returns their names.

    Targets: all attention projections, feed-forward layers and convolutions but
    conv_in and the time layers: 257 layers of the U-Net at full size.  Until someone
    sets their matrices, M is the identity: a plain LoRA.
    """
    names = [name for name, layer in network.named_modules()
             if isinstance(layer, (nn.Conv2d, nn.Linear))
             and "time_emb" not in name and name != "conv_in"]
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child,
                LoRALayer(network.get_submodule(name), rank))
    return names


class DegradationLoRA(nn.Module):
    """Adds a LoRA to a network and sets its matrices M from the degradation's scores.

    network: a U-Net, or the VAE's encoder.  All layers of a block share its M; the
    blocks are the down blocks, mid, the U-Net's up blocks, and conv_out: 10 and 6.
    """

    def __init__(self, network, rank):
        super().__init__()
        ups = getattr(network, "up_blocks", ())
        blocks = [f"down_blocks.{i}" for i in range(len(network.down_blocks))]
        blocks += ["mid_block"]
        blocks += [f"up_blocks.{i}" for i in range(len(ups))] + ["conv_out"]
        self.block_of = {                        # layer name -> index of its block
            name: next(i for i, b in enumerate(blocks) if name.startswith(b))
            for name in add_lora(network, rank)}
        self.embed = ScoreEmbedding(len(blocks), rank)

    def set(self, network, scores):
        """Give every layer its M for these scores (B, 2)."""
        matrices = self.embed(scores)                          # (B, blocks, r, r)
        for name, block in self.block_of.items():
            network.get_submodule(name).matrix = matrices[:, block]


def lora_layers(module):
    """All `LoRALayer`s inside a module."""
    return [m for m in module.modules() if isinstance(m, LoRALayer)]


@torch.no_grad()
def fold(model, scores):
    """Merge a `Restorer`'s LoRA for one image's scores (1, 2): plain networks run.

    W' = W + s B M^T A costs one small product a layer, once an image.  Undo: `unfold`.
    """
    if len(scores) != 1:
        raise ValueError(f"fold takes the scores of one image, got {len(scores)}")
    unfold(model)
    model.guide(scores)
    for layer in lora_layers(model):
        layer.fold()


def unfold(model):
    """Restore the weights from before `fold`, exactly."""
    for layer in lora_layers(model):
        layer.unfold()


def without_lora(model):
    """A copy of a `Restorer` on the same weights, every `LoRALayer` taken out again."""
    model = model.copy(share=True)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRALayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base)
    model.lora = model.end_lora = None
    return model


# ---- 3. One restorer, two ends that change (read) -- GenDR, GenDR-Pix ----------------


class Restorer(nn.Module):
    """One step of the U-Net between two ends: forward(lq_up, scores, prompt) -> image.

    lq_up (B, 3, H, W) in [-1, 1], H and W multiples of 8, already at the output size;
    scores (B, 2); the result has lq_up's shape and is not clamped.  It predicts the
    clean picture.  `shortcut` maps the encoded input to the output space and is added
    to the U-Net's output (small presets; not in the paper); None at full size.
    `lora` guides the U-Net, `end_lora` the VAE encoder in end_in, if there are any.
    """

    def __init__(self, end_in, unet, end_out, prompts=None, shortcut=None):
        super().__init__()
        self.end_in, self.unet, self.end_out = end_in, unet, end_out
        self.prompts = prompts or Prompts(unet.cfg)
        self.lora, self.end_lora, self.shortcut = None, None, shortcut

    def guide(self, scores):
        """Set every M for these scores; nothing to do where the LoRA is folded."""
        if any(layer.plain is not None for layer in lora_layers(self)):
            return
        if self.lora is not None:
            self.lora.set(self.unet, scores)
        if self.end_lora is not None:
            self.end_lora.set(self.end_in.encoder, scores)

    def step(self, h, prompt=POSITIVE):
        """The U-Net at the last timestep, on what end_in gives; for end_out.

        `guide` comes first.
        """
        t = torch.full((len(h),), 999.0, device=h.device)
        out = self.unet(h, t, self.prompts(prompt, len(h)))
        return out if self.shortcut is None else out + self.shortcut(h)

    def forward(self, lq_up, scores, prompt=POSITIVE):
        self.guide(scores)
        h = self.end_in.encode(lq_up)                          # (B, C, H/8, W/8)
        return self.end_out.decode(self.step(h, prompt))

    def latent(self, batch, prompt=POSITIVE):
        """z of a training batch, before end_out.

        The VAE's latent of the LQ picture comes from the pool, unless a LoRA changes
        the encoder.
        """
        self.guide(batch["estimate"])
        pooled = isinstance(self.end_in, VAE) and self.end_lora is None
        h = batch["z_lq"] if pooled else self.end_in.encode(batch["lq_up"])
        return self.step(h, prompt)

    def copy(self, share=False):
        """A copy, independent or (share) around the same parameter tensors.

        A matrix M left from a training step stays behind.
        """
        for layer in lora_layers(self):
            layer.matrix = None
        return share_copy(self) if share else copy.deepcopy(self)


def share_copy(module):
    """A copy of a module tree around the same parameter tensors: no second weights."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


@torch.no_grad()
def one_step(prior, vae):
    """The frozen prior's first step at x_T = y0 as a `Restorer`, on shared weights.

    The prior's conv_in sees [s x_T, y0], s its input scale at T.  With x_T = y0 and no
    noise, W' = s W[:, :C] + W[:, C:] on y0 alone gives exactly the prior's first step.
    Training the chain showed the prior noise in x_T; fine-tuning makes up for that.
    """
    unet, old = share_copy(prior.unet).requires_grad_(False), prior.unet.conv_in
    last, c = torch.tensor([prior.chain.steps], device="cpu"), vae.channels
    s = prior.chain.input_scale(last, last).item()
    unet.conv_in = new_conv(old, in_channels=c)
    unet.conv_in.weight.copy_(s * old.weight[:, :c] + old.weight[:, c:])
    unet.conv_in.bias.copy_(old.bias)
    unet.conv_in.requires_grad_(False)
    return Restorer(vae, unet, vae, prior.prompts,
                    nn.Identity() if prior.shortcut else None)


def gendr_from_prior(prior, vae, cfg):
    """GenDR's start: the prior's first step, and what is trained on top of it.

    cfg.adapter: "guided" (S3Diff's LoRA, M from the scores), "plain" (M = I), or
    "full" (no LoRA: a copy of all weights).  Always trained: conv_in, the prompts.
    With cfg.vae_lora_rank a guided LoRA on the VAE's encoder as well: then latents of
    LQ pictures cannot be pooled.
    """
    model = one_step(prior, vae)
    model.prompts = copy.deepcopy(prior.prompts).requires_grad_(True)
    if cfg.adapter == "full":
        model.unet = copy.deepcopy(model.unet).requires_grad_(True)
    elif cfg.adapter == "plain":
        add_lora(model.unet, cfg.lora_rank)
    else:
        model.lora = DegradationLoRA(model.unet, cfg.lora_rank)
        if cfg.vae_lora_rank:
            model.end_in = share_copy(vae)
            model.end_lora = DegradationLoRA(model.end_in.encoder, cfg.vae_lora_rank)
    model.unet.conv_in.requires_grad_(True)
    return model.to(device())


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
def pixel_input(teacher, cfg, rows=None):
    """Stage I's student: the teacher with pixel-unshuffle in place of its encoder.

    conv_in (192 channels) and the shortcut start by least squares on rows {"lq_up",
    "estimate"}: conv_in'(unshuffle(x)) near conv_in(encode(x)), shortcut'(unshuffle(x))
    near shortcut(encode(x)).  Not in the paper; cfg.least_squares off: torch's start.
    Without rows only the structure is built, for weights to be loaded into.
    """
    student = teacher.copy()
    student.end_lora = None
    end = student.end_in = PixelShuffle(teacher.end_in.factor)
    student.end_out = teacher.end_out                          # the same frozen VAE
    student.unet.conv_in = new_conv(teacher.unet.conv_in, in_channels=end.channels)
    if cfg.shortcut:
        student.shortcut = nn.Conv2d(end.channels, teacher.end_out.channels, 1)
    student.to(device())
    if rows is not None and cfg.least_squares:
        teacher.guide(rows["estimate"])
        x, z = (e.encode(rows["lq_up"]) for e in (end, teacher.end_in))
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
    old = teacher.unet.conv_out                                # in a LoRA, or plain
    conv = new_conv(getattr(old, "base", old), out_channels=end.channels)
    student.shortcut = nn.Identity() if cfg.shortcut else None
    if rows is not None and cfg.least_squares:
        h, seen = student.end_in.encode(rows["lq_up"]), []
        hook = teacher.unet.conv_out.register_forward_pre_hook(
            lambda _, x: seen.append(x[0]))
        teacher.guide(rows["estimate"])
        teacher.step(h)
        hook.remove()
        fit_conv(conv, seen[0], end.encode(rows["y_tea"]) - (h if cfg.shortcut else 0))
    student.unet.conv_out = (LoRALayer(conv, cfg.lora_rank)
                             if isinstance(old, LoRALayer) else conv)
    return trainable(student.to(device()))


# ---- 4. Many steps into one (read) -- GenDR: VSD, SiD, CiD ---------------------------


class Predictions(NamedTuple):
    """Five clean latents of one batch, all (B, C, h, w), and the weight w (B, 1, 1, 1).

    z_g = G(z_l); z_h the HQ latent; at z_t, the noised z_g: `real` = f_phi(z_t),
    `guided` = f_phi^cfg(z_t), `fake` = f_psi(z_t).  phi is the frozen prior, psi the
    fake score network, trained on G's outputs; all predict the clean latent.
    """
    z_g: torch.Tensor
    z_h: torch.Tensor
    real: torch.Tensor
    guided: torch.Tensor
    fake: torch.Tensor
    weight: torch.Tensor


def vsd_loss(s, xi):
    """VSD: w < sg(f_psi - f_phi), z_g >, the mean over elements; sg: no gradient.

    The value means nothing.  Autograd gives dL/dz_g = w (f_psi - f_phi), in expectation
    the gradient of KL(q_g,t || q_data,t) up to w and a factor of t, since on this chain
    score = ((1 - eta_t) f + eta_t y0 - x_t) / (kappa^2 eta_t).  xi is not used; w and
    the unguided phi are chosen to differ from SiD in one line (not in the paper).
    """
    return (s.weight * (s.fake - s.real).detach() * s.z_g).mean()


def sid_loss(s, xi):
    """SiD (2404.04057): w < f_phi - f_psi, f_phi - z_g > - xi w || f_phi - f_psi ||^2.

    Autograd goes through z_g and, by way of z_t, through both networks, whose weights
    are frozen.  With the exact psi and a fixed w the expectation is
    (1 - xi) w || f_phi - f_psi ||^2.
    """
    gap = s.real - s.fake
    return (s.weight * (gap * (s.real - s.z_g) - xi * gap ** 2)).mean()


def cid_loss(s, xi):
    """CiD: L3 - xi L1, L1 = w || f_phi - f_psi ||^2 and
    L3 = w < f_phi^cfg - f_psi, f_phi^cfg - z_h >: SiD with a guided prior, and the HQ
    latent in z_g's place.

    Autograd reaches G through z_t alone.  For a generator that is deterministic given
    z_l, the exact psi is z_g itself, and without guidance
        dL/dz_t = w J^T [ (2 xi - 1) (z_g - f_phi) + (f_phi - z_h) ],   J = df_phi/dz_t:
    for xi = 1 the regression w J^T (z_g - z_h), seen through the prior's eyes.  So CiD
    needs a prior that looks at z_t, and for a generator with a spread of its own it
    need not converge (a test shows where).  This reading is not in the paper.
    """
    gap, guided_gap = s.real - s.fake, s.guided - s.fake
    return (s.weight * (guided_gap * (s.guided - s.z_h) - xi * gap ** 2)).mean()


DISTILL = {"none": None, "vsd": vsd_loss, "sid": sid_loss, "cid": cid_loss}


def normaliser(z_g, real):
    """SiD's normaliser w = 1 / mean |z_g - f_phi| of each sample, without gradient."""
    return 1 / (z_g - real).detach().abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6)


def noised(chain, z_g, y0, rng, cfg):
    """(z_t, t): z_g noised along the residual-shifting chain to a random t.

    z_t ~ N( z_g + eta_t (y0 - z_g), kappa^2 eta_t I ), t uniform in cid_t_min ..
    cid_t_max (0: T).  GenDR noises along Stable Diffusion's chain; ours shifts.
    """
    first, last = cfg.cid_t_min, cfg.cid_t_max or cfg.steps
    t = per_sample(lambda n: torch.randint(first, last + 1, (n,), generator=rng),
                   len(z_g))
    return chain.q_sample(z_g, y0, t, batch_noise(z_g, rng)), t


def predict(prior, fake_score, z_g, z_h, y0, rng, cfg):
    """All of `Predictions` at one random t a sample; y0 conditions both networks.

    f_phi^cfg = f_neg + w (f_pos - f_neg), the prior under its two prompts.
    """
    z_t, t = noised(prior.chain, z_g, y0, rng, cfg)
    # In float: autocast's bfloat16 would drown small differences of predictions.
    real, negative, fake = (f.float() for f in (
        prior(z_t, y0, t), prior(z_t, y0, t, NEGATIVE), fake_score(z_t, y0, t)))
    guided = negative + cfg.cid_guidance * (real - negative)
    return Predictions(z_g, z_h, real, guided, fake, normaliser(z_g, real))


def fake_score_from(prior, cfg):
    """psi: the prior with a plain LoRA on its own, shared weights; starts as phi."""
    fake_score = share_copy(prior).requires_grad_(False)
    add_lora(fake_score.unet, cfg.fake_rank)
    return fake_score.to(device())


# ---- 5. What the students lose sleep over (read) -- GenDR-Pix, Sec. 3.3 --------------


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
    is folded at scores (0, 0), a clean picture; all other weights stay shared.  It must
    be frozen already.  The paper leaves the heads open: ours
    are GroupNorm and two 1x1 convolutions on the end of every level of the first half.
    """

    def __init__(self, restorer, cfg):
        super().__init__()
        restorer = restorer.copy(share=True)
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


class Adversary:
    """The two halves of the game: softplus(-D(fake)) for G, and D's own loss.

    D's: softplus(D(fake)) + softplus(-D(real)).  The generator's turn keeps the fake's
    features for D's turn, detached: one pass through the frozen backbone serves both.
    """

    def __init__(self, discriminator):
        self.discriminator, self.fake = discriminator, None

    def generator_loss(self, fake):
        """softplus(-D(fake)); `train` has frozen D in the generator's turn."""
        features = self.discriminator.features(fake)
        self.fake = [f.detach() for f in features]
        return F.softplus(-self.discriminator.judge(features)).mean()

    def discriminator_loss(self, real):
        """softplus(D(fake)) + softplus(-D(real)) on the generator's last fake."""
        with torch.no_grad():
            features = self.discriminator.features(real)
        fake, real = (self.discriminator.judge(f) for f in (self.fake, features))
        return F.softplus(fake).mean() + F.softplus(-real).mean()


# ---- 6. The stages (read) -- who teaches, who criticises, which losses ---------------


def estimator_turns(estimator, cfg):
    """The two scores by regression on the strengths that `degrade` knows.

    Each batch is turned and mirrored: neither changes blur or noise.
    """
    def losses(batch, rng):
        mirror, turn = (torch.randint(n, (), generator=rng).item() for n in (2, 4))
        lq = batch["lq"].flip(3) if mirror else batch["lq"]
        guess = estimator(torch.rot90(lq, turn, (2, 3)))
        return {"scores": F.mse_loss(guess, batch["scores"])}
    return [Turn("estimator", estimator, losses, cfg.estimator_learning_rate)]


def gendr_turns(prior, student, cfg):
    """Chapter 2: || z_g - z_h ||^2 + l1 CiD + l2 softplus(-D(z_g)), online negatives.

    G (`student`) is trained; phi (`prior`) is frozen; psi is trained on G's outputs,
    cfg.fake_steps times for each step of G; D has heads on the features of phi's first
    step, which sees clean latents (not in the paper).  Whoever is not at play is frozen
    in that turn.  GenDR's CiDA is these without the regression (S3Diff's), plus REPA,
    which needs a pretrained DINOv2 and is left out.  The few outputs under the negative
    prompt go to CiD and D like all others.  l1 = lambda_cid, l2 = lambda_cid_adv: not
    in the paper.
    """
    made = {}                                # G's turn leaves its output for psi's
    distill = DISTILL[cfg.distill]
    fake_score = fake_score_from(prior, cfg) if distill else None
    critic = (Discriminator(one_step(prior, student.end_in), cfg)
              if cfg.lambda_cid_adv else None)
    adversary = Adversary(critic)

    def generator(batch, rng):
        z_l, z_h = batch["z_lq"], batch["z_hq"]
        prompt, target = negatives(batch, "z_hq", "z_lq", rng, cfg)
        z_g = student.latent(batch, prompt)
        made["z_g"] = z_g.detach()
        losses = {"mse": F.mse_loss(z_g, target)}
        if distill:
            s = predict(prior, fake_score, z_g, z_h, z_l, rng, cfg)
            losses[cfg.distill] = cfg.lambda_cid * distill(s, cfg.xi)
        if critic:
            losses["adv"] = cfg.lambda_cid_adv * adversary.generator_loss(z_g)
        return losses

    def fake(batch, rng):
        z_t, t = noised(prior.chain, made["z_g"], batch["z_lq"], rng, cfg)
        return {"fake": F.mse_loss(fake_score(z_t, batch["z_lq"], t), made["z_g"])}

    def discriminator(batch, rng):
        return {"d": adversary.discriminator_loss(batch["z_hq"])}
    turns = [Turn("generator", student, generator, cfg.gendr_learning_rate)]
    if distill:
        turns.append(Turn("fake score", fake_score, fake, cfg.fake_learning_rate,
                          cfg.fake_steps))
    if critic:
        turns.append(Turn("discriminator", critic, discriminator,
                          cfg.critic_learning_rate))
    return turns


def adc_turns(teacher, student, cfg):
    """Stage I: L_G1 = || z_tea - z_stu ||_1 + l1 softplus(-D(z_stu)).

    Teacher: GenDR's latents (in the pool).  Critic: GenDR's features.  Real: HQ.
    Negative samples count in the reconstruction losses as S3Diff has it, and their
    outputs go to D like all others.  l1 is printed for stage II only; we reuse it.
    """
    critic = Discriminator(teacher, cfg)
    adversary = Adversary(critic)

    def generator(batch, rng):
        prompt, target = negatives(batch, "z_tea", "z_lq", rng, cfg)
        z = student.latent(batch, prompt)
        return {"l1": F.l1_loss(z, target),
                "adv": cfg.lambda_adv * adversary.generator_loss(z)}

    def discriminator(batch, rng):
        return {"d": adversary.discriminator_loss(batch["z_hq"])}
    # The generator plays first: D's turn judges the fake that it left in `adversary`.
    return [Turn("generator", student, generator, cfg.student_learning_rate),
            Turn("discriminator", critic, discriminator, cfg.critic_learning_rate)]


def pix_turns(teacher, student, lpips, cfg):
    """Stage II: L_G2 = ||y_tea - y_stu||_1 + l1 softplus(-D(y_stu)) + l2 L_P + l3 L_F.

    Teacher: GenDR's pictures (in the pool).  Critic: GenDR-Adc's features, which eats
    pictures through pixel-unshuffle; fake and real take the same random padding.
    L_P is LPIPS (the paper does not say which).  Weights 0.05 / 1 / 0.1.
    """
    critic = Discriminator(teacher, cfg)
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
    return [Turn("generator", student, generator, cfg.student_learning_rate),
            Turn("discriminator", critic, discriminator, cfg.critic_learning_rate)]


# ---- 7. What a user calls (read) -- guidance, PadCFG, restore ------------------------


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
    restorer.guide(scores)
    h = restorer.end_in.encode(x)
    negative = restorer.step(h, NEGATIVE)
    return restorer.end_out.decode(
        negative + weight * (restorer.step(h, POSITIVE) - negative))


@torch.no_grad()
def restore(restorer, estimator, lq, scale=4, weight=1.0, tile=0, scores=None):
    """lq (1, 3, h, w) in [-1, 1] -> (1, 3, s h, s w): what a user calls.

    Estimate the scores on lq itself, upsample, fold the LoRA for this image, then run
    one pass (weight 1) or two (guidance).  tile: side of the squares that are restored
    one by one, in output pixels and with 64 of overlap; 0 restores in one piece.
    """
    scores = estimator(lq) if scores is None else scores
    x = upsample(lq, scale)
    fold(restorer, scores)
    try:
        def run(piece):
            full = pad_to(piece, 8)
            with autocast(restorer.unet.cfg):
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


# ---- 8. Time, memory, operations (skim) ----------------------------------------------


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
def measure(function, repeats=5, budget=20.0):
    """(milliseconds, peak bytes) of function(): median of `repeats` after a warm-up.

    Fewer repeats once they have taken `budget` seconds.  On CUDA the peak is the
    allocator's, above what was allocated before; on the CPU `LiveBytes`.
    """
    cuda = device().type == "cuda"

    def timed():
        start = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start
    timed()
    seconds = [timed()]
    while len(seconds) < repeats and sum(seconds) < budget:
        seconds.append(timed())
    milliseconds = 1000 * sorted(seconds)[len(seconds) // 2]
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


def parts_of(model, size, scores):
    """{"end in", "U-Net", "end out": function of nothing} of one pass; size: (H, W)."""
    x = torch.zeros(1, 3, *size, device=device())
    model.guide(scores)
    h = model.end_in.encode(x)
    z = model.step(h)
    return {"end in": lambda: model.end_in.encode(x),
            "U-Net": lambda: model.step(h),
            "end out": lambda: model.end_out.decode(z)}


def macs(function, attention=True):
    """Multiply-accumulates of function()'s convolutions and matrix products.

    attention=False leaves out q k^T and the product with v (batched products).  For
    the meta device: the CPU's fused attention is one operation that nobody counts.
    """
    with FlopCounterMode(display=False) as counter:
        function()
    return sum(n for op, n in counter.get_flop_counts().get("Global", {}).items()
               if attention or not any(word in str(op) for word in ("bmm", "dot_prod"))
               ) // 2


def untrained(cfg):
    """{name: Restorer} of a preset with random weights.

    Time, memory and counts do not depend on the weights.  Inside `with torch.device(
    "meta")` nothing is allocated, and counting takes seconds at full size.
    """
    cfg = dataclasses.replace(cfg, space="latent")
    vae, prior = VAE(cfg), ResShift(cfg).requires_grad_(False)
    gendr = gendr_from_prior(prior.to(device()), vae.to(device()), cfg)
    adc = pixel_input(gendr, cfg)
    models = {"GenDR": gendr, "GenDR-Adc": adc, "GenDR-Pix": pixel_output(adc, cfg)}
    return {k: place(m.requires_grad_(False).eval()) for k, m in models.items()}


@torch.no_grad()
def counts(cfg, size):
    """{name: {"parameters", "macs", "guided": MACs with guidance}}; size: (H, W).

    Counted on the meta device: convolutions and linear layers of the U-Net, and
    everything in the VAE, with the attention in its middle; PadCFG's passes are 8
    pixels larger each way.
    """
    rows = {}
    with torch.device("meta"):
        scores = torch.zeros(1, 2)
        for name, model in untrained(cfg).items():
            fold(model, scores)
            pixel = isinstance(model.end_out, PixelShuffle)

            def count(n):
                return {k: macs(f, attention=k != "U-Net")
                        for k, f in parts_of(model, n, scores).items()}
            one = count(size)
            two = (2 * sum(count([n + 8 for n in size]).values()) if pixel
                   else sum(one.values()) + one["U-Net"])
            x = torch.zeros(1, 3, *size)
            rows[name] = {"parameters": parameters_used(model, x, scores),
                          "macs": sum(one.values()), "guided": two}
    return rows


PRINTED = {"GenDR": (933e6, None, 1637e9), "GenDR-Pix": (866e6, 344e9, 744e9)}


def print_counts(rows, size):
    """The table of `counts`, beside what GenDR-Pix prints for 512 x 512."""
    def giga(n):
        return f"{n / 1e9:9.1f}" if n else " " * 9
    print(f"\n{size[1]}x{size[0]}: multiply-accumulates (G), and the paper's at "
          "512x512")
    print(f"{'':12s} {'parameters':>12s} {'one pass':>9s} {'guided':>9s}     "
          f"{'paper: param.':>13s} {'one pass':>9s} {'guided':>9s}")
    for name, row in rows.items():
        paper = PRINTED.get(name, (None, None, None))
        p = f"{paper[0] / 1e6:11.0f} M" if paper[0] else ""
        print(f"{name:12s} {row['parameters'] / 1e6:10.2f} M {giga(row['macs'])} "
              f"{giga(row['guided'])}     {p:>13s} {giga(paper[1])} {giga(paper[2])}")


@torch.no_grad()
def benchmark(models, size, details=True):
    """{name: {"ms", "bytes", "parameters"}} of one pass, LoRA folded; size: (H, W).

    models: GenDR, GenDR-Adc, GenDR-Pix.  With details: a row for two passes as well,
    the "share" of each part in one pass's time, and `lora_overhead`'s figures.
    """
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    x, scores, rows = (2 * x - 1).to(device()), torch.zeros(1, 2, device=device()), {}
    for name, model in models.items():
        def cast(function):
            def run():
                with autocast(model.unet.cfg):
                    function()
            return run
        fold(model, scores)
        parameters = parameters_used(model, x, scores)
        passes = {name: lambda: model(x, scores)}
        if details:
            passes[name + " guided"] = lambda: guided(model, x, scores, 1.07)
        for label, function in passes.items():
            ms, peak = measure(cast(function))
            rows[label] = {"ms": ms, "bytes": peak, "parameters": parameters}
        if details:
            parts = {k: measure(cast(f))[0] for k, f in
                     parts_of(model, size, scores).items()}
            rows[name]["share"] = {k: v / sum(parts.values()) for k, v in parts.items()}
            rows[name] |= lora_overhead(model, x, scores)
        unfold(model)
    return rows


def lora_overhead(model, x, scores, rounds=7, budget=60.0):
    """Milliseconds of a pass with LoRA unfolded, folded and taken out, and of folding.

    Medians of passes in turns, so that a machine that slows down slows all alike; fewer
    rounds once they have taken `budget` seconds.  Leaves the model unfolded.
    """
    unfold(model)
    folded, bare, started = model.copy(share=True), without_lora(model), time.time()

    def run(restorer):
        with autocast(model.unet.cfg):
            restorer(x, scores)
    moves = {"unfolded ms": lambda: run(model), "fold ms": lambda: fold(folded, scores),
             "folded ms": lambda: run(folded), "plain ms": lambda: run(bare)}
    times = {name: [] for name in moves}
    while len(times["plain ms"]) < rounds and time.time() - started < budget:
        for name, move in moves.items():
            begin = time.perf_counter()
            move()
            if x.is_cuda:
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - begin))
    return {name: sorted(v)[len(v) // 2] for name, v in times.items()}


def print_benchmark(rows, size):
    """The table of `benchmark`, with ratios to GenDR at the same number of passes."""
    print(f"\n{size[1]}x{size[0]} output, {device()}, {torch.get_num_threads()} "
          "threads; LoRA folded; ratios to GenDR, like for like")
    print(f"{'':18s} {'parameters':>11s} {'ms':>9s} {'peak MB':>9s} {'faster':>8s} "
          f"{'memory':>8s}   in / U-Net / out")
    for name, row in rows.items():
        base = rows["GenDR guided" if "guided" in name else "GenDR"]
        share = " / ".join(f"{v:.0%}" for v in row.get("share", {}).values())
        print(f"{name:18s} {row['parameters'] / 1e6:9.2f} M {row['ms']:9.1f} "
              f"{row['bytes'] / 1e6:9.1f} {base['ms'] / row['ms']:7.2f}x "
              f"{row['bytes'] / base['bytes'] - 1:+8.0%}   {share}")
    for name, row in rows.items():
        if "fold ms" in row:
            before, after = (row[k] / row["plain ms"] - 1
                             for k in ("unfolded ms", "folded ms"))
            print(f"{name}: LoRA's overhead on a pass {before:+.0%} unfolded, "
                  f"{after:+.0%} folded; folding, once an image, takes "
                  f"{row['fold ms']:.1f} ms")


def growth(models, sizes):
    """Time and memory of one pass at several sizes, and their exponents in pixels.

    The exponent is the slope of a least-squares line through log(pixels), log(value);
    returns {(name, "ms" or "bytes"): exponent}.
    """
    exponents = {}
    print(f"\n{'one pass':18s} " + " ".join(f"{n:>6d}^2" for n in sizes)
          + "   exponent in pixels")
    rows = [benchmark(models, (n, n), details=False) for n in sizes]
    for name in models:
        for key, unit, scale in (("ms", "ms", 1), ("bytes", "MB", 1e-6)):
            values = [row[name][key] * scale for row in rows]
            slope = least_squares(*(torch.tensor(v).log()[:, None] for v in (
                [float(n * n) for n in sizes], values)), ridge=0)[0].item()
            exponents[name, key] = slope
            print(f"{name:12s} {unit:5s} " + " ".join(f"{v:8.0f}" for v in values)
                  + f"   {slope:.2f}")
    return exponents


def stage_turns(cfg):
    """(stage, its turns, all networks in memory), chapters 1 to 4, for `training`."""
    vae, prior = VAE(cfg).requires_grad_(False), ResShift(cfg)
    with torch.device("cpu"):
        lpips = Perceptual(cfg.lpips_net)
    lpips, vae, prior = (m.to(device()) for m in (lpips, vae, prior))
    alive = [lpips, vae, prior]
    yield "resshift", prior_turns(prior, cfg), alive
    prior.requires_grad_(False)
    gendr = gendr_from_prior(prior, vae, cfg)
    alive.append(gendr)
    yield "gendr", gendr_turns(prior, gendr, cfg), alive
    adc = pixel_input(gendr.requires_grad_(False), cfg)
    alive.append(adc)
    yield "adc", adc_turns(gendr, adc, cfg), alive
    pix = pixel_output(adc.requires_grad_(False), cfg)
    alive.append(pix)
    yield "pix", pix_turns(adc, pix, lpips, cfg), alive


def training(cfg, real=False):
    """Bytes of one training step of each big stage: {stage: {"state", "activations"}}.

    The VAE's and the estimator's own stages, which are smaller, are left out.  state:
    the weights of every network in memory (those of earlier chapters stay), and for
    what is trained AdamW's two moments, and the average.  activations: the largest peak
    of a turn's forward and backward pass, gradients included.  All in fp32 and without
    computing anything, on the meta device; bf16 autocast halves most activations and
    adds copies of the weights.  real: the same count while this device computes.
    """
    cfg = dataclasses.replace(cfg, space="latent")
    rows, rng = {}, torch.Generator().manual_seed(0)
    n, c, hw, lw = cfg.batch, cfg.latent_channels, cfg.crop // 8, cfg.crop // cfg.scale
    shapes = {"hq": (3, cfg.crop, cfg.crop), "lq_up": (3, cfg.crop, cfg.crop),
              "lq": (3, lw, lw), "z_hq": (c, hw, hw), "z_lq": (c, hw, hw),
              "z_tea": (c, hw, hw), "y_tea": (3, cfg.crop, cfg.crop), "estimate": (2,)}
    where = device() if real else torch.device("meta")
    with torch.device(where):
        stages = stage_turns(cfg)
        for name, turns, alive in stages:
            weights, trained = {}, 0
            for turn in turns:
                turn.start(cfg)
                trained += sum(p.numel() for p in turn.parameters)
                modules = (*alive, turn.module, *getattr(turn.module, "backbone", ()))
                weights |= {id(p): p.numel() for m in modules for p in m.parameters()}
            batch = {k: torch.rand(n, *shape) for k, shape in shapes.items()}
            peaks = []
            for turn in turns:
                with frozen([t.module for t in turns if t is not turn]):
                    with torch.device("cpu"), autocast(cfg), LiveBytes() as live:
                        sum(turn.losses(batch, rng).values()).backward()
                    peaks.append(live.peak)
                if real:
                    turn.optimizer.step()
                turn.optimizer.zero_grad(set_to_none=True)
            average = sum(p.numel() for p in turns[0].parameters)
            rows[name] = {"state": 4 * (sum(weights.values()) + 2 * trained + average),
                          "activations": max(peaks)}
    return rows


def print_training(rows, cfg, real):
    """The table of `training`, in GB."""
    how = f"really taken on {device()}" if real else "estimate"
    print(f"\none training step, batch {cfg.batch}, crop {cfg.crop}, fp32, {how}")
    print(f"{'stage':10s} {'state GB':>9s} {'activations GB':>15s} {'sum GB':>8s}")
    for name, row in rows.items():
        a, b = row["state"] / 1e9, row["activations"] / 1e9
        print(f"{name:10s} {a:9.2f} {b:15.2f} {a + b:8.2f}")


# ---- 9. Evaluation and report (skim) -------------------------------------------------


@torch.no_grad()
def rank_correlations(estimator, pairs, cfg, draws=24):
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


@torch.no_grad()
def ordered_pairs(estimator, pairs):
    """{"blur", "noise"}: the share of pairs that it orders, differing in one alone.

    Every held-out photo, shrunk by 4, climbs a ladder: Gaussian blur of 0.4, 0.8, 1.2
    pixels (at noise 2/255), and noise of 2, 6, 12 / 255 (at blur 0.4).
    """
    right = {name: [] for name in SCORES}
    for i, pair in enumerate(pairs):
        clean = F.interpolate(to_unit(pair.hq.cpu()), scale_factor=0.25, mode="area")
        noise = noise_like(clean, torch.Generator().manual_seed(30_000 + i))

        def steps(axis, ladder):
            seen = [estimator((2 * (blur(clean, gaussian_kernel(
                21, b, b, 0.0, "iso", 1.0)) + n / 255 * noise).clamp(0, 1) - 1)
                .to(device()))[0, axis].item() for b, n in ladder]
            right[SCORES[axis]] += [b > a for a, b in zip(seen, seen[1:])]
        steps(0, [(0.4, 2), (0.8, 2), (1.2, 2)])
        steps(1, [(0.4, 2), (0.4, 6), (0.4, 12)])
    return {name: sum(v) / len(v) for name, v in right.items()}


def sharpness(y):
    """Mean length of the luma's gradient, grey levels of 255 a pixel: (B,).

    Forward differences on images in [-1, 1].  It needs no reference, and noise raises
    it as well as detail: read it beside LPIPS.
    """
    grey = 255 * luma(to_unit(y))
    dy = grey[:, :, 1:, :-1] - grey[:, :, :-1, :-1]
    dx = grey[:, :, :-1, 1:] - grey[:, :, :-1, :-1]
    return (dx ** 2 + dy ** 2).sqrt().mean((1, 2, 3))


GUIDANCE = (0.9, 1.0, 1.07, 1.15, 1.3)


def guidance_table(m, pairs, lpips, cfg):
    """PSNR and LPIPS of both models over the weight w of out = neg + w (pos - neg).

    GenDR mixes latents, GenDR-Pix pictures (PadCFG); w = 1 is one plain pass.
    """
    table = {}
    for name, model in (("GenDR", m.gendr), ("GenDR-Pix", m.pix)):
        for w in GUIDANCE:
            def method(p):
                return restore(model, m.estimator, p.lq, cfg.scale, w)
            row = evaluate({"": method}, pairs, lpips)[""]
            table[f"{name} {w}"] = {k: row[k] for k in ("psnr", "lpips")}
    print("\nguidance w            " + " ".join(f"{w:7.2f}" for w in GUIDANCE))
    for name in ("GenDR", "GenDR-Pix"):
        for key, digits in (("psnr", 2), ("lpips", 4)):
            print(f"{name + ' ' + key.upper():21s} " + " ".join(
                f"{table[f'{name} {w}'][key]:7.{digits}f}" for w in GUIDANCE))
    return table


def draw_scores(model, estimator, pair, cfg, file, crop=160):
    """One photo restored along a grid of scores: blur to the right, noise downwards."""
    from matplotlib.figure import Figure
    values = (0.0, 0.33, 0.67, 1.0)
    figure = Figure(figsize=(13, 11), dpi=80, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 4))
    guess = estimator(pair.lq)[0].tolist()
    own = restore(model, estimator, pair.lq, cfg.scale)
    shown = {"bicubic": upsample(pair.lq, cfg.scale), "HQ": pair.hq,
             f"estimated: {guess[0]:.2f}, {guess[1]:.2f}": own}

    def show(axis, y, title):
        top, side = (max(0, n - crop) // 2 for n in y.shape[2:])
        axis.imshow(to_pil(y[:, :, top:top + crop, side:side + crop]))
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=13)
    for axis, (title, y) in zip(left.subplots(3, 1), shown.items()):
        show(axis, y, title)
    for row, noise in zip(right.subplots(4, 4), values):
        for axis, width in zip(row, values):
            scores = torch.tensor([[width, noise]], device=device())
            y = restore(model, estimator, pair.lq, cfg.scale, scores=scores)
            show(axis, y, f"blur {width}, noise {noise}")
    right.suptitle("restored with the scores set by hand", fontsize=16)
    write_file(file, lambda p: figure.savefig(p, format="png"))


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


# ---- 10. All chapters, one after the other (read) ------------------------------------


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
    """Chapters 1 to 4: train what is missing, resume what was interrupted.

    Score and adversarial losses need not fall while the pictures get better, so every
    chapter is watched by PSNR and LPIPS, beside bicubic's and the prior's.
    """
    cfg, pool = run.cfg, Pool(run.cfg)
    end, prior = chapter_one(run, pool, pairs)

    def stage(name, build, turns, steps, pool=pool, watch=None):
        return chapter(run, name, build, lambda m: train(
            run, name, turns(m), pool, steps, watch and (lambda: watch(m))))
    estimator = stage("estimator", lambda: DegradationEstimator(cfg),
                      lambda m: estimator_turns(m, cfg), cfg.estimator_steps,
                      pool.with_batch(cfg.estimator_batch))
    pool.add("estimate", lambda rows: estimator(rows["lq"]))
    watch = watcher(prior, end, estimator, pairs, lpips, cfg)

    def some():
        """Rows for a least-squares start: 128 crops of 128, fewer larger ones."""
        most = max(1, 128 ** 3 // cfg.crop ** 2)
        return pool.rows(torch.arange(min(len(pool), most)))
    gendr = stage("gendr", lambda: gendr_from_prior(prior, end, cfg),
                  lambda m: gendr_turns(prior, m, cfg), cfg.gendr_steps, watch=watch)
    pool.add("z_tea", gendr.latent)
    adc = stage("adc", lambda: pixel_input(gendr, cfg, some()),
                lambda m: adc_turns(gendr, m, cfg), cfg.adc_steps, watch=watch)
    pool.add("y_tea", lambda rows: end.decode(rows["z_tea"]))
    pix = stage("pix", lambda: pixel_output(adc, cfg, some()),
                lambda m: pix_turns(adc, m, lpips, cfg), cfg.pix_steps, watch=watch)
    return Models(end, prior, estimator, gendr, adc, pix)


def watcher(prior, end, estimator, pairs, lpips, cfg):
    """watch(model) -> PSNR and LPIPS on the held-out photos, of model and what it is
    measured by: bicubic and the prior, which are computed at the first call."""
    def figures(name, method):
        # Restored once, measured twice: pictures by the pair's name.
        done = {p.name: method(p) for p in pairs}
        return {f"{name} psnr": mean_psnr(lambda p: done[p.name], pairs),
                f"{name} lpips": mean_lpips(lambda p: done[p.name], pairs, lpips)}

    @lru_cache(maxsize=1)
    def fixed():
        return (figures("bicubic", lambda p: upsample(p.lq, cfg.scale))
                | figures("prior", lambda p: sample(prior, end, p.lq, cfg)))

    def watch(model):
        now = figures("val", lambda p: restore(model, estimator, p.lq, cfg.scale))
        return now | fixed()
    return watch


def load_all(folder):
    """(cfg, Models) of a finished run."""
    cfg, end, prior = load_chapter_one(folder)

    def load(name, model):
        model = load_weights(model, Path(folder) / f"{name}.safetensors")
        return place(model.requires_grad_(False).eval())
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


def report(folder, cfg, models, pairs, lpips, size):
    """Evaluate, measure, draw; write metrics.json and report.png; True if PASS."""
    m, table = models, evaluate(methods_of(models, cfg), pairs, lpips)
    print_table(table, lpips.name)
    ranks = rank_correlations(m.estimator, pairs, cfg)
    print("\nestimator, rank correlation with the truth: "
          + ", ".join(f"{k} {v:.2f}" for k, v in ranks.items()))
    order = ordered_pairs(m.estimator, pairs)
    print("pairs that differ in one factor, in the right order: "
          + ", ".join(f"{k} {v:.0%}" for k, v in order.items()))
    guidance = guidance_table(m, pairs, lpips, cfg)
    bench = benchmark({"GenDR": m.gendr, "GenDR-Adc": m.adc, "GenDR-Pix": m.pix}, size)
    print_benchmark(bench, size)
    lattice = {"HQ": [lattice_energy(p.hq) for p in pairs],
               "Pix": [lattice_energy(y) for y in table["GenDR-Pix"]["pictures"]]}
    lattice = {k: torch.cat(v).mean().item() for k, v in lattice.items()}
    rows = checks(table, bench, lattice)
    passed = print_checks(rows)
    metrics = {"lpips": lpips.name, "device": str(device()), "torch": torch.__version__,
               "seed": cfg.seed, "estimator": ranks, "ordered": order,
               "guidance": guidance, "lattice": lattice, "benchmark": bench,
               "table": {k: {n: v for n, v in row.items() if n != "pictures"}
                         for k, row in table.items()},
               "checks": [{"name": r.name, "value": r.value, "unit": r.unit,
                           "floor": r.reached(r.floor), "bar": r.reached(r.bar)}
                          for r in rows]}
    write_file(Path(folder) / "metrics.json", json.dumps(metrics, indent=1))
    draw_report(table, pairs, lpips.name, Path(folder) / "report.png")
    return passed


def variant(adapter="guided", distill="none", adversary=False, **change):
    """What a row of ABLATED changes: all that rows differ in, whatever the run has."""
    return dict(adapter=adapter, distill=distill, eta_1=0.0, eta_T=0.999,
                lambda_cid_adv=Config.lambda_cid_adv if adversary else 0.0,
                negative=Config.negative) | change


ABLATED = {                              # chapter 2: what of GenDR does what
    "no LoRA: the frozen prior": variant("plain", gendr_steps=0),
    "plain LoRA (M = I)": variant("plain"),
    "guided LoRA": variant(),
    "guided LoRA, no negatives": variant(negative=0.0),
    "full fine-tuning": variant("full"),
    "guided LoRA + VSD": variant(distill="vsd"),
    "guided LoRA + SiD": variant(distill="sid"),
    "guided LoRA + CiD": variant(distill="cid"),
    "guided LoRA + CiD + adv.": variant(distill="cid", adversary=True),
}


def ablate(run, models, pairs, lpips, seeds=3):
    """A GenDR a row of ABLATED and a seed, on a finished run's VAE and estimator.

    The prior is trained anew with the paper's eta_1, whatever the run has: only a prior
    that looks at x_t has scores to distil.  All rows have one budget, cfg.ablate_steps,
    and the same seeds: start and batches.  Prints mean and standard deviation over the
    seeds, and writes table.json.  Interrupted, it goes on with the row it was in.
    """
    m, cfg, pool, table = models, run.cfg, Pool(run.cfg), {}
    pool.add("z_hq", lambda rows: m.end.encode(rows["hq"]))
    pool.add("z_lq", lambda rows: m.end.encode(rows["lq_up"]))
    pool.add("estimate", lambda rows: m.estimator(rows["lq"]))
    first = run.part("prior", eta_1=0.0, eta_T=0.999)
    prior = chapter(first, "resshift", lambda: ResShift(first.cfg),
                    lambda p: train_prior(first, p, pool))
    for name, change in ABLATED.items():
        slug = "".join(c if c.isalnum() else "-" for c in name)
        for seed in range(seeds):
            part = run.part(f"{slug}-{seed}", **(
                dict(gendr_steps=cfg.ablate_steps, seed=seed) | change))
            model = chapter(
                part, "gendr", lambda: gendr_from_prior(prior, m.end, part.cfg),
                lambda g: train(part, "gendr", gendr_turns(prior, g, part.cfg), pool,
                                part.cfg.gendr_steps))
            found = evaluate(
                {w: lambda p, w=w: restore(model, m.estimator, p.lq, cfg.scale, w)
                 for w in (1.0, cfg.guidance)}, pairs, lpips)
            row = {k: found[1.0][k] for k in ("psnr", "lpips")}
            row["sharpness"] = torch.cat([sharpness(y) for y in
                                          found[1.0]["pictures"]]).mean().item()
            row |= {f"{k} w": found[cfg.guidance][k] for k in ("psnr", "lpips")}
            table.setdefault(name, []).append(row)
    write_file(run.folder / "table.json", json.dumps(table, indent=1))
    print_ablation(table, lpips.name, cfg)
    return table


def print_ablation(table, lpips_name, cfg):
    """Mean +- standard deviation over the seeds, one row a variant."""
    seeds = len(next(iter(table.values())))
    print(f"\n{cfg.ablate_steps} steps, {seeds} seeds, held-out photos; "
          f"w: guided by {cfg.guidance}; {lpips_name}")
    columns = {"psnr": ("PSNR", 2), "lpips": ("LPIPS", 4), "sharpness": ("sharp.", 2),
               "psnr w": ("PSNR w", 2), "lpips w": ("LPIPS w", 4)}
    print(f"{'':26s} " + " ".join(f"{title:>15s}" for title, _ in columns.values()))
    for name, rows in table.items():
        cells = []
        for key, (_, digits) in columns.items():
            v = torch.tensor([row[key] for row in rows])
            spread = v.std().item() if len(v) > 1 else 0.0
            cells.append(f"{v.mean():.{digits}f} +- {spread:.{digits}f}")
        print(f"{name:26s} " + " ".join(f"{cell:>15s}" for cell in cells))


# ---- 11. Command line (skim) ---------------------------------------------------------


def restore_file(args, folder):
    """--input to --output; an alpha channel is resized beside the picture."""
    check_output(args.output)
    cfg, m = load_all(folder)
    passes = args.passes or (2 if args.guidance else 1)
    picture = open_picture(args.input)
    lq = from_pil(picture).to(device())
    alpha = picture.getchannel("A") if picture.mode == "RGBA" else None
    weight = 1.0 if passes == 1 else args.guidance or cfg.guidance
    passes = 1 if weight == 1 else 2                           # w = 1: nothing to mix
    if args.compile:
        m.pix.unet.compile()
    scores = args.degradation.to(device()) if args.degradation is not None else None
    y = restore(m.pix, m.estimator, lq, cfg.scale, weight, args.tile, scores)
    save_picture(y, args.output, alpha)
    print(f"{args.output}: {y.shape[3]}x{y.shape[2]}, passes: {passes}")


def score_pair(text):
    """"blur,noise" -> (1, 2) scores in [0, 1]; UserError if they are not."""
    try:
        blurred, noisy = (float(v) for v in text.split(","))
        if 0 <= blurred <= 1 and 0 <= noisy <= 1:
            return torch.tensor([[blurred, noisy]])
    except ValueError:
        pass
    raise UserError(f"--degradation {text}: two numbers in 0 .. 1, as in 0.8,0.1")


def output_size(text):
    """"512" -> (512, 512); "3840x2160", width first -> (2160, 3840); or UserError."""
    sides = text.split("x")
    if len(sides) > 2 or not all(n.isdigit() and int(n) % 8 == 0 and int(n) >= 16
                                 for n in sides):
        raise UserError(f"--size {text}: N or WxH, multiples of 8, 16 or more")
    return int(sides[-1]), int(sides[0])


def run_bench(args, cfg):
    """--bench: counts, then time and memory of the preset; with --train, its memory."""
    check_config(cfg, data=False)
    if args.train:
        print_training(training(cfg, args.real), cfg, args.real)
        return
    print_counts(counts(cfg, args.size), args.size)
    models = untrained(cfg)
    if args.compile:
        for model in models.values():
            model.unet.compile()
    print_benchmark(benchmark(models, args.size), args.size)
    if min(args.size) >= 512:
        growth(models, range(256, min(args.size) + 1, 128))


def commands():
    """The parser of all flags of this script."""
    parser = config_parser(__doc__)
    parser.add_argument("--train", action="store_true", help="all chapters, and --eval")
    parser.add_argument("--eval", action="store_true", help="the table of a run")
    parser.add_argument("--data", help="--eval: photos, or a folder with lq/ and hq/")
    parser.add_argument("--bench", action="store_true",
                        help="counts, time and memory of a preset, untrained; with "
                        "--train: memory of a training step")
    parser.add_argument("--real", action="store_true",
                        help="--bench --train: take the step instead of estimating it")
    parser.add_argument("--ablate", action="store_true",
                        help="GenDR's variants in one table, on a finished run")
    parser.add_argument("--figure", action="store_true",
                        help="a photo along a grid of scores: RUN/scores.png")
    parser.add_argument("--size", type=output_size, default="512", metavar="N|WxH",
                        help="--bench: output pixels")
    parser.add_argument("--input", help="a picture to restore")
    parser.add_argument("--output", default="up.png", help="where to write it")
    parser.add_argument("--tile", type=int, default=0,
                        help="restore in squares of this many output pixels")
    parser.add_argument("--degradation", type=score_pair, metavar="BLUR,NOISE",
                        help="--input: these scores in [0, 1], not the estimator's")
    parser.add_argument("--compile", action="store_true",
                        help="--input, --bench: the U-Net through torch.compile")
    parser.add_argument("--passes", type=int, choices=(1, 2),
                        help="2: PadCFG, with the weight --guidance")
    return parser


def main():
    """python gendr_pix.py: train, evaluate, measure, or restore one picture."""
    parser = commands()
    args = parser.parse_args()
    folder = args.run or f"runs/{args.preset}"
    if args.input:
        restore_file(args, folder)
        return 0
    if args.bench:
        run_bench(args, config_from(args))
        return 0
    if args.ablate or args.figure:
        cfg, models = load_all(folder)
        pairs = held_out(cfg)
        if args.figure:
            draw_scores(models.pix, models.estimator, pairs[-1], cfg,
                        f"{folder}/scores.png")
            print(f"{folder}/scores.png")
        else:
            run = Run(folder, cfg).part("ablate", **given_numbers(args))
            check_config(run.cfg)
            ablate(run, models, pairs, Perceptual(cfg.lpips_net).to(device()))
        return 0
    if not (args.train or args.eval):
        parser.error("nothing to do: --train, --eval, --bench, --ablate, --figure, or "
                     "--input")
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
        print_config(cfg)
        lpips = Perceptual(cfg.lpips_net).to(device())
        models = train_all(run, pairs, lpips)
        if world()[0] > 0:                                     # rank 0 evaluates
            return 0
    passed = report(folder, cfg, models, pairs, lpips, args.size)
    minutes = (time.time() - started) / 60
    print(f"\n{'PASS' if passed else 'FAIL'}: {folder}, {minutes:.1f} minutes on "
          f"{device()}, {torch.get_num_threads()} threads, seed {cfg.seed}")
    return 0 if passed else 1


if __name__ == "__main__":
    command_line(main)
