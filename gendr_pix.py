"""GenDR-Pix: one-step super-resolution without a VAE, from its ancestors up.

Chapter 2 turns the T-step prior of `resshift.py` into a one-step restorer (GenDR) with
S3Diff's degradation-guided LoRA, regression, then score distillation; chapter 3
replaces its VAE encoder by pixel-unshuffle (GenDR-Adc), chapter 4 its decoder by
pixel-shuffle (GenDR-Pix).  Each chapter's model is the next one's start, and the critic
of chapters 3 and 4; the prior teaches GenDR, and GenDR the last two.

Papers: GenDR-Pix, arXiv 2602.10630; GenDR, 2503.06790; S3Diff, 2409.17058;
        ResShift, 2307.12348; SiD (score identity distillation), 2404.04057.

    python gendr_pix.py --train --tiny              all chapters; 13 minutes, 2 cores
    python gendr_pix.py --tiny --input lq.png --output up.png
    python gendr_pix.py --tiny --eval               the table once more
    python gendr_pix.py --exact                     chapter 0 once more, seconds
    python gendr_pix.py --ablate --tiny             every claim a row, 3 seeds
    python gendr_pix.py --bench --full              counts, time, memory at full size

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
import os
import sys
import time
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path

# Before torch: for --help resshift.py puts something light in its place.
from resshift import (
    NEGATIVE, POSITIVE, QUALITY, TABLE, VAE, Pairs, Perceptual, PixelShuffle, Prompts,
    ResShift, ResidualShift, Run, UserError, autocast, chapter, chapter_end,
    chapter_prior, command_line, command_of, config_from, degrade, device,
    error_by_time, evaluate, exact_table, fit_conv, from_pil, held_out,
    lattice_amplitude, lattice_peak, lattice_points, luma, means, negatives, noise_like,
    open_picture, pad_to, picture_files, print_table, psnr, quiet, rank_and_size,
    sample, spectral_distance, spectrum, spread, to_pil, to_unit, train, upsample,
    write_file)

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# ---- 1. The degradation's scores (read) -- S3Diff, Sec. 3.2 --------------------------
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
            return nn.Sequential(
                nn.Conv2d(3, n, 3, padding=1), nn.SiLU(),
                nn.Conv2d(n, 2 * n, 3, 2, padding=1), nn.SiLU(),
                nn.Conv2d(2 * n, 4 * n, 3, 2, padding=1), nn.SiLU())
        self.branches = nn.ModuleList([branch(), branch()])
        self.heads = nn.ModuleList([
            nn.Sequential(nn.Linear(4 * n * pooled, 64), nn.SiLU(), nn.Linear(64, 1))
            for _ in range(2)])

    def forward(self, lq):
        scores = []
        for branch, head in zip(self.branches, self.heads):
            f = branch(lq).flatten(2).float()                  # (B, C, n)
            deviation = (f.var(2, unbiased=False) + 1e-6).log() / 2
            at = [round(q * (f.shape[2] - 1)) for q in self.QUANTILES]
            quantiles = f.sort(2).values[:, :, at].flatten(1)  # (B, 3 C)
            scores.append(head(torch.cat([f.mean(2), deviation, quantiles], dim=1)))
        return torch.sigmoid(torch.cat(scores, dim=1))         # (B, 2)


class ScoreEmbedding(nn.Module):
    """Scores and blocks -> one r x r matrix M per image and block: (B, blocks, r, r).

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
        network.set_submodule(name, LoRALayer(network.get_submodule(name), rank))
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
    model.folded = True
    for layer in lora_layers(model):
        layer.fold()


def unfold(model):
    """Restore the weights from before `fold`, exactly."""
    model.folded = False
    for layer in lora_layers(model):
        layer.unfold()


@contextmanager
def folded(model, scores):
    """Inside, the model is folded for these scores, and takes none."""
    fold(model, scores)
    try:
        yield model
    finally:
        unfold(model)


# ---- 3. One restorer, two ends that change (read) -- GenDR, GenDR-Pix ----------------
class Restorer(nn.Module):
    """One step of the U-Net between two ends: forward(lq_up, scores, prompt) -> image.

    lq_up (B, 3, H, W) in [-1, 1], H and W multiples of 8, already at the output size;
    scores (B, 2), None if and only if folded; the result has lq_up's shape and is not
    clamped.  It predicts the clean picture.  `shortcut` maps the encoded input to the
    output space and is added to the U-Net's output (small presets; not in the paper).
    `lora` guides the U-Net, `end_lora` the VAE encoder in end_in, if there are any.
    """

    def __init__(self, end_in, unet, end_out, prompts=None, shortcut=None):
        super().__init__()
        self.end_in, self.unet, self.end_out = end_in, unet, end_out
        self.prompts = prompts or Prompts(unet.cfg)
        self.lora = self.end_lora = None
        self.shortcut, self.folded = shortcut, False

    def guide(self, scores):
        """Set every M; ValueError unless there are scores or the model is folded."""
        if self.folded != (scores is None):
            raise ValueError("a folded model takes no scores, any other needs them")
        if self.lora is not None and not self.folded:
            self.lora.set(self.unet, scores)
        if self.end_lora is not None and not self.folded:
            self.end_lora.set(self.end_in.encoder, scores)

    def step(self, h, prompt=POSITIVE):
        """The U-Net at the last timestep, on what end_in gives; `guide` comes first."""
        t = torch.full((len(h),), 999.0, device=h.device)
        out = self.unet(h, t, self.prompts(prompt, len(h)))
        return out if self.shortcut is None else out + self.shortcut(h)

    def forward(self, lq_up, scores=None, prompt=POSITIVE):
        self.guide(scores)
        h = self.end_in.encode(lq_up)                          # (B, C, H/8, W/8)
        return self.end_out.decode(self.step(h, prompt))

    def latent(self, batch, prompt=POSITIVE):
        """z of a training batch, before end_out; z_lq is at hand for a plain VAE."""
        self.guide(batch.estimate)
        ready = isinstance(self.end_in, VAE) and self.end_lora is None
        return self.step(batch.z_lq if ready else self.end_in.encode(batch.lq_up),
                         prompt)

    def copy(self, share=False):
        """A copy, independent or (share) around the same parameter tensors."""
        for layer in lora_layers(self):
            layer.matrix = None                                # of a training step
        return share_copy(self) if share else copy.deepcopy(self)


def share_copy(module):
    """A copy of a module tree around the same parameter tensors: no second weights."""
    kept = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(t): t for t in kept})


@torch.no_grad()
def one_step(prior, vae):
    """The frozen prior's first step at x_T = y0 as a `Restorer`, on shared weights.

    The prior's conv_in sees [s x_T, y0], s its input scale at T.  With x_T = y0 and no
    noise, W' = s W[:, :C] + W[:, C:] on y0 alone gives exactly the prior's first step.
    Training the chain showed the prior noise in x_T; fine-tuning makes up for that.
    """
    unet, old, c = share_copy(prior.unet), prior.unet.conv_in, vae.channels
    s = prior.chain.input_scale(prior.chain.eta_T)
    unet.conv_in = new_conv(old, c)
    unet.conv_in.weight.copy_(s * old.weight[:, :c] + old.weight[:, c:])
    unet.conv_in.bias.copy_(old.bias)
    return Restorer(vae, unet.requires_grad_(False), vae, prior.prompts,
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
    return model


@torch.no_grad()
def new_conv(old, in_channels=None, out_channels=None, repeated=False):
    """A 3x3 convolution in place of `old`, with other channels, at torch's start, or
    (repeated; not in the paper) old's weights until they fill it, shared by inputs."""
    i, o = in_channels or old.in_channels, out_channels or old.out_channels
    conv = nn.Conv2d(i, o, 3, padding=1).to(old.weight.device)
    if repeated:
        rows, columns = (torch.arange(n) % k for n, k in zip((o, i), old.weight.shape))
        conv.weight.copy_(old.weight[rows][:, columns] * old.in_channels / i)
        conv.bias.copy_(old.bias[rows])
    return conv


@torch.no_grad()
def pixel_input(gendr, cfg, rows=None):
    """Stage I's student: GenDR with pixel-unshuffle in place of its encoder.

    conv_in (192 channels) and the shortcut start by least squares on a `Batch`:
    conv_in'(unshuffle(x)) near conv_in(encode(x)), shortcut'(unshuffle(x)) near
    shortcut(encode(x)).  Not in the paper; without cfg.least_squares, or a batch, they
    start as `new_conv` has it.  All is trained but the VAE behind it.
    """
    adc = gendr.copy()
    adc.end_in, adc.end_lora, adc.end_out = PixelShuffle(8), None, gendr.end_out
    adc.unet.conv_in = new_conv(gendr.unet.conv_in, 192, repeated=cfg.repeated)
    if cfg.shortcut:
        adc.shortcut = nn.Conv2d(192, cfg.latent_channels, 1)
    adc.to(device()).requires_grad_(True)
    adc.end_out.requires_grad_(False)
    if rows is not None and cfg.least_squares:
        gendr.guide(rows.estimate)
        x, z = (model.end_in.encode(rows.lq_up) for model in (adc, gendr))
        fit_conv(adc.unet.conv_in, x, gendr.unet.conv_in(z))
        if cfg.shortcut:
            fit_conv(adc.shortcut, x, gendr.shortcut(z))
    return adc


@torch.no_grad()
def pixel_output(adc, cfg, rows=None):
    """Stage II's student: pixel-shuffle in place of the decoder, 192 channels out.

    conv_out starts by least squares on GenDR-Adc's own features: it maps them to the
    teacher's unshuffled picture, less the shortcut (the identity on pixels).  All is
    trained.
    """
    pix = adc.copy()
    pix.end_out, pix.shortcut = PixelShuffle(8), nn.Identity() if cfg.shortcut else None
    old = adc.unet.conv_out                                    # in a LoRA, or plain
    conv = new_conv(getattr(old, "base", old), None, 192, cfg.repeated)
    if rows is not None and cfg.least_squares:
        seen, x = [], pix.end_in.encode(rows.lq_up)
        hook = old.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
        adc.latent(rows)
        hook.remove()
        y = pix.end_out.encode(rows.y_tea)
        fit_conv(conv, seen[0], y - x if cfg.shortcut else y)
    pix.unet.conv_out = LoRALayer(conv, cfg.lora_rank) if lora_layers(old) else conv
    return pix.to(device()).requires_grad_(True)


# ---- 4. Many steps into one (read) -- GenDR: VSD, SiD, CiD ---------------------------
# z_g = G(z_l) the generator's latent, z_h the HQ latent; at z_t, the noised z_g: `real`
# = f_phi(z_t), `guided` = f_phi^cfg(z_t), `fake` = f_psi(z_t).  phi is the frozen
# prior, psi the fake score network, trained on G's outputs; all predict the clean
# latent (B, C, h, w); w (B, 1, 1, 1).


def vsd_loss(z_g, real, fake, w):
    """VSD: w < sg(f_psi - f_phi), z_g >, the mean over elements; sg: no gradient.

    The value means nothing.  Autograd gives dL/dz_g = w (f_psi - f_phi), in expectation
    the gradient of KL(q_g,t || q_data,t) up to w and a factor of t, since on this chain
    score = ((1 - eta_t) f + eta_t y0 - x_t) / (kappa^2 eta_t).
    """
    return (w * (fake - real).detach() * z_g).mean()


def sid_loss(z_g, real, fake, w, xi=1.0):
    """SiD (2404.04057): w < f_phi - f_psi, f_phi - z_g > - xi w || f_phi - f_psi ||^2.

    Autograd goes through z_g and, by way of z_t, through both networks, whose weights
    are frozen.  With the exact psi and a fixed w the expectation is
    (1 - xi) w || f_phi - f_psi ||^2.
    """
    return (w * ((real - fake) * (real - z_g) - xi * (real - fake) ** 2)).mean()


def cid_loss(z_h, real, guided, fake, w, xi=1.0):
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
    return (w * ((guided - fake) * (guided - z_h) - xi * (real - fake) ** 2)).mean()


def noised(chain, z_g, y0, draws, cfg):
    """(z_t, t): z_t ~ N( z_g + eta_t (y0 - z_g), kappa^2 eta_t I ), t uniform in
    1 .. min(distill_t, T).  GenDR noises along Stable Diffusion's chain, we shift."""
    t = draws.times(1, min(cfg.distill_t, cfg.steps), len(z_g))
    return chain.q_sample(z_g, y0, t, draws.noise(z_g)), t


def distillation(prior, fake_score, z_g, z_h, y0, draws, cfg):
    """cfg.distill's loss at one random t a sample; y0 conditions both networks.

    f_phi^cfg = f_neg + cid_guidance (f_pos - f_neg), the prior under its two prompts;
    w = 1 / mean |z_g - f_phi| of each sample (SiD's normaliser), without gradient.
    Without a fake score f_psi is z_g, which is exact: given y0 and prompt, G has one
    output.  No gradient moves z_g's mean over positions: a constant in a latent is an
    8x8 pattern all over the picture, and scores drift there (not in the paper).
    """
    mean = z_g.mean((2, 3), keepdim=True)
    z_g = z_g - mean + mean.detach()
    z_t, t = noised(prior.chain, z_g, y0, draws, cfg)
    # In float: autocast's bfloat16 would drown small differences of predictions.
    real = prior(z_t, y0, t).float()
    fake = fake_score(z_t, y0, t).float() if fake_score else z_g.detach()
    gap = (z_g - real).detach().abs().mean((1, 2, 3), keepdim=True)
    w = 1 / gap.clamp(min=1e-6)
    if cfg.distill == "vsd":
        return vsd_loss(z_g, real, fake, w)
    if cfg.distill == "sid":
        return sid_loss(z_g, real, fake, w, cfg.xi)
    negative = prior(z_t, y0, t, NEGATIVE).float()
    return cid_loss(z_h, real, negative + cfg.cid_guidance * (real - negative), fake, w,
                    cfg.xi)


def fake_score_from(prior, cfg):
    """psi: the prior with a plain LoRA on its own, shared weights; starts as phi."""
    fake_score = share_copy(prior).requires_grad_(False)
    add_lora(fake_score.unet, cfg.fake_rank)
    return fake_score.to(device())


# ---- 5. Grids: random padding, Fourier loss, critic (read) -- GenDR-Pix, Sec. 3.3 ----
def rand_pad(x, ph, pw):
    """randpad(y) = pad(y, [ph, 8 - ph, pw, 8 - pw]), ph, pw in 0 .. 7, reflecting.

    x (B, C, H, W) -> (B, C, H + 8, W + 8); the content moves to phase (ph, pw) of the
    8x8 grid, so that a discriminator cannot latch onto fixed patches.  One draw serves
    fake and real; mode and pairing are not in the paper.
    """
    return F.pad(x, (pw, 8 - pw, ph, 8 - ph), mode="reflect")


def fourier_mask(h, w, factor=8, radius=1):
    """M (h, w) over fft2's bins: 1 near the lattice (k h/8, l w/8) but (0, 0), else 0.

    One wrong weight of the last layer repeats in every 8x8 patch: its energy sits
    within one bin of those points.  h and w are multiples of the factor.  Radius 1 and
    the exception are not in the paper.
    """
    def near(n, step):                   # bins within the radius of a multiple of step
        distance = torch.arange(n) % step
        return torch.minimum(distance, step - distance) <= radius
    lattice = near(h, h // factor)[:, None] & near(w, w // factor)
    return (lattice & ~(near(h, h)[:, None] & near(w, w))).float()


def masked_fourier_loss(y_student, y_teacher, factor=8, radius=1):
    """L_F = || M (|F y_stu| - |F y_tea|) ||_1, the mean over M's bins.

    F is the unitary fft2 of each channel, so that a bin does not grow with the picture;
    this scaling is not in the paper.  Inputs (B, C, H, W) -> a scalar.
    """
    mask = fourier_mask(*y_student.shape[2:], factor, radius).to(y_student.device)
    a, b = (torch.fft.fft2(y.float(), norm="ortho").abs() for y in
            (y_student, y_teacher))
    return (mask * (a - b)).abs().sum() / (mask.sum() * len(a) * a.shape[1])


class Discriminator(nn.Module):
    """D: small heads on the frozen features of the previous stage's restorer.

    Its LoRA is folded at scores (0, 0), a clean picture; all other weights stay shared.
    It must be frozen already.  The paper leaves the heads open: ours are GroupNorm and
    two 1x1 convolutions on the end of every level of the first half.
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

    def look(self, y, phase):
        """The features of a picture at this phase of the 8x8 grid, by `rand_pad`."""
        return self.features(self.backbone[0].end_in.encode(rand_pad(y, *phase)))

    def features(self, h):
        """h, what the restorer's U-Net eats -> the ends of its down blocks and mid."""
        g = self.backbone[0]
        t = torch.full((len(h),), 999.0, device=h.device)
        middle, skips, _ = g.unet.encode(h, t, g.prompts(POSITIVE, len(h)))
        return [*(skips[i] for i in self.ends), middle]

    def judge(self, features):
        """Logits of every level, all positions in one row: (B, n)."""
        return torch.cat([head(f).flatten(1) for head, f in
                          zip(self.heads, features)], dim=1)

    def fooled(self, fake):
        """The generator's loss on the features of its output: softplus(-D(fake))."""
        return F.softplus(-self.judge(fake)).mean()

    def losses(self, fake, real):
        """D's own, softplus(D(fake)) + softplus(-D(real)), on the features of a fake,
        detached, and of HQ."""
        fake, real = (self.judge([f.detach() for f in x]) for x in (fake, real))
        return {"d": F.softplus(fake).mean() + F.softplus(-real).mean()}


# ---- 6. The stages (read) -- who teaches, who criticises, which losses ---------------
def estimator_stage(estimator, cfg):
    """The two scores by regression on the strengths that `degrade` knows.

    Each batch is turned and mirrored: neither changes blur or noise.
    """
    def step(batch, draws):
        lq = batch.lq.flip(3) if draws.dice.randrange(2) else batch.lq
        guess = estimator(torch.rot90(lq, draws.dice.randrange(4), (2, 3)))
        yield estimator, {"scores": F.mse_loss(guess, batch.scores)}
    return step, {estimator: cfg.estimator_learning_rate}


def gendr_stage(prior, student, cfg):
    """Chapter 2: mean (z_g - z_h)^2 + l0 mean (zm_g - zm_h)^2 + l1 VSD (or SiD, CiD) +
    l2 softplus(-D(z_g)), with online negatives; zm: a latent's mean over positions,
    whose error is an 8x8 pattern all over the picture (not in the paper).

    G (`student`) is trained; phi (`prior`) is frozen; psi is trained on G's outputs,
    cfg.fake_steps times for each step of G; D has heads on the features of phi's first
    step, which sees clean latents (not in the paper).  GenDR's CiDA is CiD, adversarial
    and REPA, which needs a pretrained DINOv2 and is left out; regression in latents
    first, then VSD at small t is what worked here (README); S3Diff regresses images,
    2 MSE + 5 LPIPS.  Outputs under the negative prompt go to VSD and D like all others.
    """
    distill = cfg.distill != "none"
    fake_score = fake_score_from(prior, cfg) if distill and cfg.fake_steps else None
    critic = (Discriminator(one_step(prior, student.end_in), cfg)
              if cfg.lambda_distill_adv else None)

    def step(batch, draws):
        z_l, z_h = batch.z_lq, batch.z_hq
        prompt, target = negatives(z_h, z_l, draws, cfg)
        z_g = student.latent(batch, prompt)
        losses = {"mse": F.mse_loss(z_g, target), "mean": cfg.lambda_mean * F.mse_loss(
            z_g.mean((2, 3)), target.mean((2, 3)))}
        if distill:
            losses[cfg.distill] = cfg.lambda_distill * distillation(
                prior, fake_score, z_g, z_h, z_l, draws, cfg)
        if critic:
            seen = critic.features(z_g)
            losses["adv"] = cfg.lambda_distill_adv * critic.fooled(seen)
        yield student, losses
        z_g = z_g.detach()
        for _ in range(cfg.fake_steps if distill else 0):
            z_t, t = noised(prior.chain, z_g, z_l, draws, cfg)
            yield fake_score, {"fake": F.mse_loss(fake_score(z_t, z_l, t), z_g)}
        if critic:
            yield critic, critic.losses(seen, critic.features(z_h))
    rates = {student: cfg.gendr_learning_rate, fake_score: cfg.fake_learning_rate,
             critic: cfg.critic_learning_rate}
    return step, {player: rate for player, rate in rates.items() if player}


def adc_stage(gendr, student, cfg):
    """Stage I: L_G1 = || z_tea - z_stu ||_1 + l1 softplus(-D(z_stu)).

    Teacher: GenDR's latents.  Critic: GenDR's features.  Real: HQ.  Negative samples
    count in the reconstruction losses as S3Diff has it, and their outputs go to D like
    all others.  l1 is printed for stage II only; we reuse it.
    """
    critic = Discriminator(gendr, cfg)

    def step(batch, draws):
        prompt, target = negatives(batch.z_tea, batch.z_lq, draws, cfg)
        z = student.latent(batch, prompt)
        seen = critic.features(z)
        yield student, {"l1": F.l1_loss(z, target),
                        "adv": cfg.lambda_adv * critic.fooled(seen)}
        yield critic, critic.losses(seen, critic.features(batch.z_hq))
    return step, {student: cfg.student_learning_rate, critic: cfg.critic_learning_rate}


def pix_stage(adc, student, lpips, cfg):
    """Stage II: L_G2 = ||y_tea - y_stu||_1 + l1 softplus(-D(y_stu)) + l2 L_P + l3 L_F.

    Teacher: GenDR's pictures.  Critic: GenDR-Adc's features, which eats pictures
    through pixel-unshuffle; fake and real take the same random padding.  L_P is LPIPS
    (the paper does not say).  Weights 0.05 / 1 / 0.1.
    """
    critic = Discriminator(adc, cfg)

    def step(batch, draws):
        phase = [draws.dice.randrange(cfg.pad_phases) for _ in "yx"]
        prompt, target = negatives(batch.y_tea, batch.lq_up, draws, cfg)
        y = student(batch.lq_up, batch.estimate, prompt)
        losses = {"l1": F.l1_loss(y, target)}
        seen = critic.look(y, phase)
        losses["adv"] = cfg.lambda_adv * critic.fooled(seen)
        losses["lpips"] = cfg.lambda_lpips * lpips(y, target).mean()
        losses["fourier"] = cfg.lambda_fourier * masked_fourier_loss(
            y, target, radius=cfg.mask_radius)
        yield student, losses
        yield critic, critic.losses(seen, critic.look(batch.hq, phase))
    return step, {student: cfg.student_learning_rate, critic: cfg.critic_learning_rate}


# ---- 7. What a user calls (read) -- guidance, PadCFG, restore ------------------------
def pad_cfg(restorer, x, weight, scores=None, passes=2, shift=1):
    """y = w G(pad(x, [4,4,4,4]), c_pos) + (1 - w) G(pad(x, [3,5,3,5]), c_neg).

    Each output is cropped by its own padding before mixing.  Plain guidance (shift 0)
    amplifies the 8x8 grid in pixel space; two phases of it make a self-ensemble at no
    extra pass.  x (B, 3, H, W).  With 4 or 8 passes (ours) each branch is the mean over
    n = passes / 2 phases, 8/n (j, 3j) further, j < n: of a pattern's harmonics (k, l)
    only those with k + 3l a multiple of n are left.
    """
    mixed, (h, w), n = 0, x.shape[2:], passes // 2
    for j in range(n):
        for prompt, share, first in ((POSITIVE, weight, 4), (NEGATIVE, 1 - weight,
                                                             4 - shift)):
            top, left = (first + 8 // n * j) % 8, (first + 24 // n * j) % 8
            if share:
                y = restorer(rand_pad(x, top, left), scores, prompt)
                mixed = mixed + share / n * y[:, :, top:top + h, left:left + w]
    return mixed


def guided(restorer, x, weight, scores=None, passes=2, shift=1):
    """out = neg + w (pos - neg): two passes; PadCFG where the output end is pixels.

    With a VAE behind it the U-Net's latents are mixed (S3Diff), and decoded once.
    """
    if isinstance(restorer.end_out, PixelShuffle):
        return pad_cfg(restorer, x, weight, scores, passes, shift)
    restorer.guide(scores)
    h = restorer.end_in.encode(x)
    negative = restorer.step(h, NEGATIVE)
    return restorer.end_out.decode(negative + weight * (restorer.step(h) - negative))


@torch.no_grad()
def restore(restorer, estimator, lq, scale=4, passes=1, weight=1.07, tile=0,
            scores=None, shift=1):
    """lq (1, 3, h, w) in [-1, 1] -> (1, 3, s h, s w): what a user calls.

    Estimate the scores on lq itself, upsample, fold the LoRA for this image, then run
    one pass, or with this weight of the guidance two (or 4 or 8, and with `shift`, as
    `pad_cfg` has it).  tile: side of the squares that are restored one by one, in
    output pixels and with 64 of overlap; 0 restores in one piece.
    """
    def run(piece):                      # `rand_pad` reflects: 16 pixels or more
        full = pad_to(piece, 8 if min(piece.shape[2:]) > 8 else 16)
        with autocast(restorer.unet.cfg):
            y = restorer(full) if passes == 1 else guided(
                restorer, full, weight, passes=passes, shift=shift)
        return y[:, :, :piece.shape[2], :piece.shape[3]].float()
    x = upsample(lq, scale)
    with folded(restorer, estimator(lq) if scores is None else scores):
        return tiled(run, x, tile).clamp(-1, 1)


def tiled(run, x, tile, overlap=64):
    """run() on overlapping squares of x, cross-faded with a linear ramp, that leaves
    out the 16 pixels next to an inner border: they have seen less of the picture.
    tile 0: in one piece."""
    if not tile:
        return run(x)
    total, weights = torch.zeros_like(x), torch.zeros_like(x[:, :1])
    starts = [range(0, max(n - overlap, 1), tile - overlap) for n in x.shape[2:]]
    for top in starts[0]:
        for left in starts[1]:
            at = (..., slice(top, top + tile), slice(left, left + tile))
            rows, columns = (torch.minimum(
                torch.arange(n) - 16 + 99 * (start == 0),
                torch.arange(n, 0, -1) - 17 + 99 * (start + n == whole)).clamp(0, 32)
                for n, start, whole in zip(x[at].shape[2:], (top, left), x.shape[2:]))
            fade = (rows[:, None] * columns).to(x)
            total[at] += fade * run(x[at])
            weights[at] += fade
    return total / weights


# ---- 8. All chapters, one after the other (read) -------------------------------------
# Models are kept in a dict {chapter: model}, in this order:
CHAPTERS = ("vae", "resshift", "estimator", "start", "regression", "gendr", "adc",
            "pix")
# "start" is GenDR without score and adversarial terms; "gendr" goes on with them,
# "regression" without them and for as many steps: what GenDR must be compared with.
NAMES = {"gendr": "GenDR", "adc": "GenDR-Adc", "pix": "GenDR-Pix"}
COLUMNS = ("bicubic", "regression", "ResShift", *NAMES.values())    # of the report


def build(name, m, cfg, rows=None):
    """The untrained model of a chapter, from those before it, in m."""
    def gendr():
        model = gendr_from_prior(m["resshift"], m["vae"], cfg)
        if "start" in m:
            model.load_state_dict(m["start"].state_dict())
        return model
    return {"vae": lambda: VAE(cfg), "resshift": lambda: ResShift(cfg),
            "estimator": lambda: DegradationEstimator(cfg),
            "start": gendr, "regression": gendr, "gendr": gendr,
            "adc": lambda: pixel_input(m["gendr"], cfg, rows),
            "pix": lambda: pixel_output(m["adc"], cfg, rows)}[name]()


def stage_of(name, model, m, cfg, lpips=None):
    """What teaches that model: (step, rates)."""
    if name == "estimator":
        return estimator_stage(model, cfg)
    if name == "adc":
        return adc_stage(m["gendr"], model, cfg)
    if name == "pix":
        prior = one_step(m["resshift"], m["vae"]) if cfg.critic == "prior" else None
        return pix_stage(prior or m[cfg.critic], model, lpips, cfg)
    if name in ("start", "regression"):
        rate = cfg.start_learning_rate if name == "start" else cfg.gendr_learning_rate
        cfg = dataclasses.replace(cfg, distill="none", lambda_distill_adv=0.0,
                                  gendr_learning_rate=rate)
    return gendr_stage(m["resshift"], model, cfg)


def next_chapter(run, name, m, pairs=None, lpips=None, watch=None):
    """The model of chapter `name`: loaded, or with `pairs` trained if it is missing."""
    def teach(model):
        stage = stage_of(name, model, m, run.cfg, lpips)
        steps = getattr(run.cfg, f"{name.replace('regression', 'gendr')}_steps")
        train(run, name, stage, pairs, steps, watch and (lambda: watch(*stage[1])))
    rows = pairs.some(128) if pairs and name in ("adc", "pix") else None
    return chapter(run, name, lambda: build(name, m, run.cfg, rows), pairs and teach,
                   list(m.values()))


def all_chapters(run, pairs=None, lpips=None, held=()):
    """{chapter: model} of a run: loaded, or with `pairs` trained where missing.

    Score and adversarial losses need not fall while the pictures get better, so every
    chapter is watched by measures on every other held-out picture, one draw of each.
    """
    def watch(model, *_):
        row = evaluate({"": restored(model, m)}, [
            p for p in held if p.draw == 0][::2], lpips)[""]
        return {f"val {k}": row[k] for k in ("psnr", "lpips", "spectral", "lattice")}
    m = {"vae": chapter_end(run, pairs), "resshift": chapter_prior(run, pairs)}
    for name in CHAPTERS[2:]:
        watching = watch if held and name != "estimator" else None
        m[name] = next_chapter(run, name, m, pairs, lpips, watching)
        if pairs and name == "estimator":                      # what it teaches others
            pairs.add("estimate", lambda batch: m["estimator"](batch.lq), keep=False)
        elif pairs and name == "gendr":
            add_teachers(pairs, m, run.cfg)
    return m


def add_teachers(pairs, m, cfg):
    """Let GenDR, or HQ itself (cfg.teacher), fill z_tea and y_tea."""
    z, y = {"gendr": (lambda batch: m["gendr"].latent(batch),
                      lambda batch: m["vae"].decode(batch.z_tea)),
            "hq": (lambda batch: batch.z_hq, lambda batch: batch.hq)}[cfg.teacher]
    pairs.add("z_tea", z, keep=False)
    pairs.add("y_tea", y, keep=False)


def restored(model, m, **how):
    """A method for `evaluate`: `restore` on a held-out pair's LQ."""
    return lambda p: restore(model, m["estimator"], p.lq, p.scale, **how)


def methods_of(m, guidance):
    """{name: function of a held-out pair -> picture}: every row of the first table."""
    def autoencode(p):
        y = m["vae"].decode(m["vae"].encode(pad_to(p.hq, 8)))
        return y[:, :, :p.hq.shape[2], :p.hq.shape[3]]

    two = dict(passes=2, weight=guidance)
    return {"HQ": lambda p: p.hq, "VAE": autoencode,
            "bicubic": lambda p: upsample(p.lq, p.scale),
            "regression": restored(m["regression"], m),
            "ResShift": lambda p: sample(m["resshift"], m["vae"], p.lq, p.scale),
            **{label: restored(m[name], m) for name, label in NAMES.items()},
            "GenDR guided": restored(m["gendr"], m, **two),
            "GenDR-Pix PadCFG": restored(m["pix"], m, **two)}


# ---- 9. One step in the exact world (read) -- chapter 0 once more --------------------
EXACT_ROWS = {                           # row: (score, first and last t, regression)
    "regression": (None, 1, 1, 1.0), "VSD, t > 5": (vsd_loss, 6, 15, 1.0),
    "VSD, t <= 5": (vsd_loss, 1, 5, 1.0), "4 VSD, t <= 5": (vsd_loss, 1, 5, 0.25),
    "VSD alone, t <= 5": (vsd_loss, 1, 5, 0.0), "SiD, t <= 5": (sid_loss, 1, 5, 1.0),
    "CiD, t <= 5": (cid_loss, 1, 5, 1.0), "CiD alone, t <= 5": (cid_loss, 1, 5, 0.0)}


def exact_generator(name, world, y0, rng, steps=400, batch=512):
    """An MLP G(y0), taught by regression, then as EXACT_ROWS[name] says; its points.

    phi is the exact denoiser; so is psi: z_g, as G has one output for each y0.  It is
    held fixed: where autograd reached it, CiD would push z_g away from the data.
    """
    (score, first, last, regression), losses = EXACT_ROWS[name], []
    chain = ResidualShift()
    torch.manual_seed(rng.initial_seed())
    g = nn.Sequential(nn.Flatten(), nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64),
                      nn.SiLU(), nn.Linear(64, 2), nn.Unflatten(1, (2, 1, 1)))
    for i in range(3 * steps):
        if i in (0, 2 * steps):
            optimizer = torch.optim.Adam(g.parameters(), 2e-3 if i else 5e-3)
        x0, y = world.draw(batch, rng)
        z_g, t = g(y), torch.randint(first, last + 1, (batch,), generator=rng)
        loss = F.mse_loss(z_g, x0)
        if score and i >= 2 * steps:
            z_t = chain.q_sample(z_g, y, t, noise_like(z_g, rng))
            real, fake = world.denoise(y, chain, z_t, t), z_g.detach()
            w = 1 / (z_g - real).detach().abs().mean(1, keepdim=True).clamp(min=1e-6)
            given = (x0, real) if score is cid_loss else (z_g,)
            loss = regression * loss + score(*given, real, fake, w)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [g(y0).detach()], {"first": sum(losses[2 * steps:][:50]) / 50,
                              "last": sum(losses[-50:]) / 50}


def exact():
    """--exact: where each loss puts the points of a one-step generator."""
    exact_table("one step, 3 seeds", {name: partial(exact_generator, name) for name in
                                      EXACT_ROWS}, "one_step.png",
                {"first": ("loss, first 50", ".2f"), "last": ("last 50", ".2f")})
    print("""
Regression finds the mean, off the curve.  VSD at small t draws it to the curve for a
little error; at large t the noised mean looks like anything, and VSD is silent.
SiD at xi = 1 is VSD here.  CiD is regression seen through J: it moves nothing.
The trap: in both rows "alone" the loss is 0 from first to last, but VSD moves every
point and CiD none.  The value of such a loss says nothing.""")


# ---- 10. Time, memory, operations (skim) ---------------------------------------------
def peak_bytes(function):
    """Peak bytes of the CPU tensors that function() allocates: activations, not
    weights, and not what a kernel takes for itself."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")            # or the profiler talks
    with torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as seen:
        function()
    events = sorted(seen.function_events, key=lambda event: event.time_range.start)
    return max(accumulate(event.self_cpu_memory_usage for event in events))


@torch.no_grad()
def measure(function, cfg, seconds):
    """(milliseconds, peak bytes) of function(): after a warm-up the median of the runs
    of so many seconds, one at least.  On CUDA the peak is the allocator's, above what
    was allocated before."""
    with autocast(cfg):
        timer = Timer("function()", globals={"function": function},
                      num_threads=torch.get_num_threads())
        ms = 1000 * timer.blocked_autorange(min_run_time=seconds).median
        if device().type == "cpu":
            return ms, peak_bytes(function)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
    return ms, torch.cuda.max_memory_allocated() - before


def untrained(cfg):
    """{chapter: Restorer} of a preset with random weights, which no count depends on.

    Inside `with torch.device("meta")` nothing is allocated.
    """
    m = {}
    for name in CHAPTERS:
        m[name] = build(name, m, cfg).to(device()).requires_grad_(False).eval()
    return {name: m[name] for name in NAMES}


def count_pass(model, size):
    """(G multiply-accumulates of all, and of `step`; M parameters used) by one folded
    pass on size^2.  The U-Net's attention products, q k^T and with v, do not count.

    For the meta device: the CPU's fused attention is one operation that nobody counts.
    """
    used = {}

    def note(module, *_):
        used.update({p: p.numel() for p in module.parameters(recurse=False)})
    with FlopCounterMode(display=False) as counter, (
            nn.modules.module.register_module_forward_hook(note)):
        model(torch.zeros(1, 3, size, size))

    def macs(part, attention=True):
        return sum(n for op, n in counter.get_flop_counts().get(part, {}).items() if
                   attention or not any(word in str(op) for word in (
                       "bmm", "dot_prod"))) / 2e9
    unet = macs("Restorer.unet", attention=False)
    return (macs("Global") - macs("Restorer.unet") + unet,
            unet + macs("Restorer.shortcut"), sum(used.values()) / 1e6)


@torch.no_grad()
def counts(cfg, size):
    """{model: {"parameters", "one", "two"}}: M, and G MACs of one pass and with
    guidance, where PadCFG's passes are 8 pixels larger each way.  LoRA is folded."""
    rows = {}
    with torch.device("meta"):
        for name, model in untrained(cfg).items():
            with folded(model, torch.zeros(1, 2)):
                one, step, parameters = count_pass(model, size)
                padded = 2 * count_pass(model, size + 8)[0]
            rows[NAMES[name]] = {"parameters": parameters, "one": one,
                                 "two": padded if name == "pix" else one + step}
    return rows


@torch.no_grad()
def benchmark(models, size):
    """Print and return {row: {"ms", "MB", "faster", "memory", "share"}} at size^2:
    a row for one folded pass and one for two (guided)."""
    x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    x, scores, rows = (2 * x - 1).to(device()), torch.zeros(1, 2, device=device()), {}
    for name, model in models.items():
        cfg = model.unet.cfg
        seconds = size ** 2 / 1e5        # 2.6 at 512x512
        with folded(model, scores):
            one, two = (measure(f, cfg, seconds) for f in (
                lambda: model(x), lambda: guided(model, x, 1.07)))
            h = model.end_in.encode(x)
            z = model.step(h)
            parts = [measure(f, cfg, seconds / 5)[0] for f in (
                lambda: model.end_in.encode(x), lambda: model.step(h),
                lambda: model.end_out.decode(z))]
        for suffix, (ms, peak) in {"": one, " guided": two}.items():
            row = rows[NAMES[name] + suffix] = {"ms": ms, "MB": peak / 1e6}
            base = rows["GenDR" + suffix]
            row |= {"faster": base["ms"] / ms, "memory": row["MB"] / base["MB"] - 1}
        rows[NAMES[name]]["share"] = " / ".join(f"{p / sum(parts):.0%}" for p in parts)
    print_table(f"{size}x{size}, {device()}, {torch.get_num_threads()} threads",
                rows, {"ms": ("ms", ".1f"), "MB": ("peak MB", ".1f"),
                       "faster": ("faster", ".2f"), "memory": ("memory", "+.0%"),
                       "share": ("in / U-Net / out", "")})
    return rows


# ---- 11. Evaluation and report (skim) ------------------------------------------------
@torch.no_grad()
def rank_correlations(estimator, held, cfg, draws=8):
    """{"blur", "noise"}: Spearman's, estimate against truth, on `draws` new
    degradations of every held-out photo, with seeds of their own."""
    found = [degrade(held[i % len(held)].hq, cfg, torch.Generator().manual_seed(
        20_000 + i)) for i in range(draws * len(held))]
    guess = torch.cat([estimator(lq.to(device())).cpu() for lq, _ in found])
    true = torch.cat([scores for _, scores in found])
    return {n: spearman(t, g) for n, t, g in zip(("blur", "noise"), true.T, guess.T)}


def spearman(a, b):
    """Rank correlation of two (N,) tensors; ties share their mean rank."""
    ranks = [(x < x[:, None]).sum(1) + 0.5 * (x == x[:, None]).sum(1) for x in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def checks(t, bench, errors):
    """{claim: (measured, unit, "<" or ">", floor, bar)}; None asks for nothing.

    Floors are what PASS stands for, bars what we aim at (the papers' claims).  t:
    `evaluate`'s table.  GenDR-Pix prints 2.8x and 60 % for PadCFG against GenDR, which
    is guided too; here both are asked like for like, with guidance and without.
    """
    def gain(a, b, key="psnr"):
        return t[a][key] - t[b][key], "dB"

    def share(a, b, key):
        return 100 * t[a][key] / t[b][key], "%"
    bic, reg, res, gen, adc, pix = COLUMNS
    rows = {
        "VAE, PSNR": (t["VAE"]["psnr"], "dB", ">", 28, 30),
        "VAE, lattice peak over HQ's": (*gain("VAE", "HQ", "lattice"), "<", None, 1.5),
        "prior's error at t = T over t = 1": (errors[-1] / errors[0], "x", ">", 2, 3),
        "ResShift, spectral distance of bicubic's": (*share(res, bic, "spectral"), "<",
                                                     60, 40),
        "ResShift, LPIPS of bicubic's": (*share(res, bic, "lpips"), "<", 100, 85),
        "ResShift, PSNR over bicubic": (*gain(res, bic), ">", None, -1.5),
        "regression, PSNR over bicubic": (*gain(reg, bic), ">", 0.3, 0.5),
        "GenDR, spectral distance of regression's": (*share(gen, reg, "spectral"), "<",
                                                     100, 60),
        "GenDR, PSNR over ResShift": (*gain(gen, res), ">", 0, 0),
        "GenDR, LPIPS of regression's": (*share(gen, reg, "lpips"), "<", None, 100)}
    for name in (adc, pix):
        rows |= {f"{name}, PSNR over GenDR": (*gain(name, gen), ">", -0.3, -0.3),
                 f"{name}, LPIPS of GenDR's": (*share(name, gen, "lpips"), "<", None,
                                               105),
                 f"{name}, spectral distance over GenDR's": (
                     *gain(name, gen, "spectral"), "<", None, 1)}
    rows[f"{pix}, lattice peak over HQ's"] = (*gain(pix, "HQ", "lattice"), "<", 8, 3)
    for suffix, floor in (("", 60), (" guided", None)):
        row = bench[pix + suffix]
        rows |= {f"{pix}{suffix}, peak memory saved": (-100 * row["memory"], "%", ">",
                                                       floor, 60),
                 f"{pix}{suffix}, times faster": (row["faster"], "x", ">", None, 2.8)}
    return rows


def reached(value, sign, limit):
    """Whether a floor or bar of `checks` holds."""
    return limit is None or (value > limit if sign == ">" else value < limit)


def print_checks(rows):
    """Every row with its number, its floor and its bar; True if all floors hold."""
    def cell(value, sign, limit):
        verdict = "ok" if reached(value, sign, limit) else "MISSED"
        return "" if limit is None else f"{sign} {limit:g} {verdict}"
    print_table("claim", {
        name: {"measured": f"{value:.2f} {unit:2s}", "floor": cell(value, sign, floor),
               "bar": cell(value, sign, bar)} for name, (value, unit, sign, floor, bar)
        in rows.items()}, {k: (k, "") for k in ("measured", "floor", "bar")})
    return all(reached(value, sign, floor) for value, _, sign, floor, _ in
               rows.values())


def most_detail(hq, side=128, sign=1):
    """(top, left), multiples of 16, of the crop of hq (1, 3, H, W) whose gradient is
    largest, or (sign -1) smallest."""
    grey = luma(hq)
    edges = grey.diff(dim=2)[..., 1:].abs() + grey.diff(dim=3)[:, :, 1:].abs()
    mean = F.avg_pool2d(edges, min(side, *hq.shape[2:]) - 1, stride=16)[0, 0]
    return [16 * int(n) for n in divmod(int((sign * mean).argmax()), mean.shape[1])]


def draw_report(table, held, lpips, file, side=128, rows=6):
    """report.png: a row a picture, a column a method, where HQ has most detail; under
    each PSNR / LPIPS / spectral distance."""
    from matplotlib.figure import Figure
    shown = [i for i, p in enumerate(held) if p.draw == 0]
    if len(shown) > rows:
        shown = [shown[i * len(shown) // rows] for i in range(rows)]
    figure = Figure(figsize=(20, 2.9 * len(shown)), dpi=110, layout="constrained")
    axes = figure.subplots(len(shown), len(COLUMNS) + 2, squeeze=False)
    for line, i in zip(axes, shown):
        top, left = most_detail(held[i].hq, side)

        def cut(x):
            return x[:, :, top:top + side, left:left + side]
        lq = F.interpolate(held[i].lq, held[i].hq.shape[2:])
        show(line[0], cut(lq), "LQ", held[i].name)
        show(line[-1], cut(held[i].hq), "HQ")
        for axis, method in zip(line[1:], COLUMNS):
            e = table[method]["each"][i]
            show(axis, cut(table[method]["pictures"][i]), method,
                 f"{e['psnr']:.2f} / {e['lpips']:.3f} / {e['spectral']:.1f}")
    figure.supxlabel(f"PSNR (dB) / {lpips.name} / spectral distance (dB)")
    write_file(file, lambda path: figure.savefig(path, format="png"))


def draw_spectra(table, file):
    """spectrum.png: radial power spectra, mean over the held-out pictures.  Blur is a
    drop, noise a rise; the rings average an 8x8 lattice away: see the lattice peak."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 6), dpi=100, layout="constrained")
    axis = figure.subplots()
    for name in ("HQ", *COLUMNS):
        level = torch.cat([spectrum(y) for y in table[name]["pictures"]]).mean(0).cpu()
        axis.plot((torch.arange(len(level)) + 0.5) / len(level) / 2, level, label=name,
                  color="black" if name == "HQ" else None)
    axis.set(xlabel="radial frequency, cycles a pixel", ylabel="power, dB")
    axis.legend()
    write_file(file, lambda path: figure.savefig(path, format="png"))


def draw_curves(run, file):
    """curves.png: losses, PSNR and spectral distance by step, chapter after chapter."""
    from matplotlib.figure import Figure
    figure, curves = Figure((15, 4.5), 90, layout="constrained"), run.curves()
    for axis, (title, names) in zip(figure.subplots(1, 3), {
            "loss": ("mse", "scores", "l1"), "held-out PSNR, dB": ("val psnr",),
            "spectral distance, dB": ("val spectral",)}.items()):
        first = 0
        for stage, name in (key for key in curves if key[1] in names):
            steps, values = zip(*curves[stage, name].items())
            axis.plot([first + n for n in steps], values, ".-", label=stage)
            first += steps[-1]
        axis.set(xlabel="step", title=title, yscale="log" if title == "loss" else
                 "linear")
        axis.legend()
    write_file(file, lambda path: figure.savefig(path, format="png"))


def report(run, m, held, lpips, size, guidance):
    """Evaluate, measure, draw; write metrics.json and pictures; True if PASS."""
    table = evaluate(methods_of(m, guidance), held, lpips)
    print_table(f"held-out pictures; {lpips.name}", table, QUALITY)
    groups = sorted({p.group for p in held})
    for group in groups if len(groups) > 1 else ():
        at = [i for i, p in enumerate(held) if p.group == group]
        print_table(f"{len(at)} of {len(held)}: {group}", {
            name: means([row["each"][i] for i in at]) for name, row in table.items()},
            QUALITY)
    first = [p for p in held if p.draw == 0]
    ranks = rank_correlations(m["estimator"], first, run.cfg)
    print("\nestimator, rank correlation with the truth: "
          + ", ".join(f"{k} {v:.2f}" for k, v in ranks.items()))
    errors = error_by_time(m["resshift"], m["vae"], first)
    print("the prior's error at t = 1 .. T: ", *(f"{e:.3f}" for e in errors))
    bench = benchmark({name: m[name] for name in NAMES}, size)
    rows = checks(table, bench, errors)
    passed = print_checks(rows)
    write_file(run.folder / "metrics.json", json.dumps({
        "lpips": lpips.name, "device": str(device()), "torch": torch.__version__,
        "seed": run.cfg.seed, "estimator": ranks, "error_by_t": errors,
        "benchmark": bench, "checks": {k: {
            "value": v, "unit": unit, "floor": reached(v, sign, floor), "bar": reached(
                v, sign, bar)} for k, (v, unit, sign, floor, bar) in rows.items()},
        "table": {name: {k: v for k, v in row.items() if k != "pictures"}
                  for name, row in table.items()}}, indent=1).replace(
                      "Infinity", "null"))           # HQ's own PSNR
    draw_report(table, held, lpips, run.folder / "report.png")
    draw_spectra(table, run.folder / "spectrum.png")
    draw_curves(run, run.folder / "curves.png")
    return passed


def show(axis, picture, title="", below=""):
    """A picture (1, 3, H, W) in [-1, 1] on a matplotlib axis, without ticks."""
    axis.imshow(to_pil(picture), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=12)
    axis.set_xlabel(below, fontsize=10)


# ---- 12. Every claim a row (skim) -- models that differ in Config alone --------------
PASSES = {"plain CFG": dict(passes=2, shift=0), "PadCFG": dict(passes=2),
          "4 passes": dict(passes=4), "8 passes": dict(passes=8)}      # of `restore`
PIX = "Pix: plain start"                 # the row that chapter 4's others change


def ablation_rows(n, crop):
    """{row: (chapters trained anew, change of Config)}; n: each one's budget in steps.

    The rows of chapters 3 and 4 start plainly, as the paper's ends do.
    """
    one, both, last = ("start",), ("adc", "pix"), ("pix",)
    score, again = ("gendr",), dict(adc_steps=0, pix_steps=2 * n)
    rows = {
        "the frozen prior": (one, dict(adapter="plain", start_steps=0)),
        "plain LoRA (M = I)": (one, dict(adapter="plain")), "guided LoRA": (one, {}),
        "guided LoRA, no negatives": (one, dict(negative=0.0)),
        "full fine-tuning": (one, dict(adapter="full")), "regression": (score, {}),
        "VSD": (score, dict(distill="vsd")), "SiD": (score, dict(distill="sid")),
        "CiD": (score, dict(distill="cid")),
        "adversarial": (score, dict(lambda_distill_adv=0.1)),
        "VSD + adversarial": (score, dict(distill="vsd", lambda_distill_adv=0.1)),
        "ends one after the other": (both, {}), "both ends at once": (both, again),
        PIX: (last, {}), "Pix: no critic": (last, dict(lambda_adv=0.0)),
        "Pix: the prior's features": (last, dict(critic="prior")),
        "Pix: GenDR's features": (last, dict(critic="gendr")),
        "Pix: no random padding": (last, dict(pad_phases=1)),
        "Pix: no Fourier loss": (last, dict(lambda_fourier=0.0)),
        **{f"Pix: mask radius {k}": (last, dict(mask_radius=k)) for k in (0, 2)},
        "Pix: unmasked but near (0, 0)": (last, dict(mask_radius=crop // 16)),
        "Pix: HQ for a teacher": (last, dict(teacher="hq"))}
    for name, change in {"plain": {}, "repeated weights": dict(repeated=True),
                         "least squares": dict(least_squares=True)}.items():
        rows[f"Pix: {name}, untrained"] = last, change | dict(pix_steps=0)
        rows |= {f"Pix: {name}": (last, change)} if change else {}
    base = dict(distill="none", lambda_distill_adv=0.0, least_squares=False,
                log_every=max(1, n // 5), **{f"{k}_steps": n for k in (
                    "start", "gendr", "adc", "pix")})
    return {name: (chapters, base | new) for name, (chapters, new) in rows.items()}


ABLATION = {k: v for k, v in QUALITY.items() if k != "lattice_amplitude"} | {
    "teacher": ("PSNR to GenDR", ".1f"), "within": ("steps to 0.3 dB", ".0f"),
    "seen": ("D right at (0, 0)", ".2f"), "unseen": ("elsewhere", ".2f")}


def ablate(run, m, pairs, held, lpips, steps, only="", seeds=3):
    """--ablate: train, or go on with, every row whose name contains `only`, on the
    chapters m of a finished run; all rows: ablation.json, ablation.md, lattice.png.

    Rows share all but their change: start, batches, noise, budget, held-out pictures;
    seeds differ in start and noise.
    """
    cfg, held = run.cfg, [p for p in held if p.draw == 0]
    rows = ablation_rows(steps, cfg.crop)
    methods = methods_of(m, cfg.guidance)
    known = evaluate({k: methods[k] for k in ("bicubic", *NAMES.values())}, held, lpips)
    found = {name: [{k: row[k] for k in QUALITY}] for name, row in known.items()}
    jobs = [(name, seed) for name in rows if only in name for seed in range(seeds)]
    for name, seed in tqdm(jobs, "rows", disable=quiet()):
        (chapters, change), slug = rows[name], "".join(
            c if c.isalnum() else "-" for c in name)
        before = CHAPTERS[:CHAPTERS.index(chapters[0])]
        part = run.part(f"rows/{slug}-{seed}", before, seed=cfg.seed + seed, **change)
        file = part.folder / "row.json"
        if not file.exists():
            mine, watch = {k: m[k] for k in before}, None
            add_teachers(pairs, m, part.cfg)
            for each in chapters:
                if chapters[-1] == "pix":
                    watch = partial(watch_pix, m, held, known["GenDR"])
                mine[each] = next_chapter(part, each, mine, pairs, lpips, watch)
            result = row_of(name, part, mine, m, held, known["GenDR"], lpips)
            write_file(file, json.dumps(result))
            if name == PIX and seed == 0:
                draw_lattice(mine["pix"], m, held, run.folder / "lattice.png")
        for label, row in json.loads(file.read_text()).items():
            found.setdefault(label, []).append(row)
    text = print_table(f"{steps} steps, {seeds} seeds; {lpips.name}", {
        k: spread(v, ABLATION) for k, v in found.items()}, ABLATION)
    if not only:
        bench = {size: {"time": benchmark({k: m[k] for k in NAMES}, size),
                        "macs": counts(cfg, size)} for size in (256, 512, 1024)}
        write_file(run.folder / "ablation.md", text)
        write_file(run.folder / "ablation.json", json.dumps({
            "rows": found, "benchmark": bench}, indent=1).replace("Infinity", "null"))
    return found


def row_of(name, part, mine, m, held, gendr, lpips):
    """{label: numbers} of a trained row: quality, and from its log how it learned."""
    last, model = list(mine.items())[-1]
    methods = {name: restored(model, m)}
    if name == PIX:
        methods |= {f"{name}, {k}": restored(model, m, weight=part.cfg.guidance, **how)
                    for k, how in PASSES.items()}
    table, curves = evaluate(methods, held, lpips), part.curves()
    rows = {label: {k: row[k] for k in QUALITY} for label, row in table.items()}
    if last == "pix":
        for label, row in table.items():
            rows[label]["teacher"] = mean_psnr(row["pictures"], gendr["pictures"])
        gaps = curves.get((last, "over GenDR"), {})
        rows[name]["within"] = min((n for n, gap in gaps.items() if gap > -0.3),
                                   default=math.inf)
        rows[name] |= {k: list(curves[last, k].values())[-1] for k in
                       ("seen", "unseen") if (last, k) in curves}
    return rows


def mean_psnr(a, b):
    """Mean PSNR of two lists of pictures in [-1, 1]."""
    return sum(psnr(to_unit(x), to_unit(y)).item() for x, y in zip(a, b)) / len(a)


@torch.no_grad()
def watch_pix(m, held, gendr, student, critic):
    """PSNR over GenDR's (its row of `evaluate`), and the share of positions that D
    tells right at phase (0, 0) of the 8x8 grid and at three others."""
    ys = [restored(student, m)(p) for p in held]
    hq = [p.hq for p in held]

    def right(*phases):
        told = [sign * critic.judge(critic.look(y, phase)) > 0 for phase in phases
                for sign, pictures in ((-1, ys[:4]), (1, hq[:4])) for y in pictures]
        return torch.cat([x.flatten() for x in told]).float().mean().item()
    return {"over GenDR": mean_psnr(ys, hq) - gendr["psnr"], "seen": right((0, 0)),
            "unseen": right((3, 3), (4, 4), (5, 1))}


def draw_lattice(pix, m, held, file):
    """lattice.png: why padding removes the grid.  A flat crop, contrast times 4, and
    the log spectrum, for one pass and PASSES; the mean over n phases of the positive
    branch: its lattice peak, beside the theory (of one pass's harmonics those with
    n | k + 3 l are left, the others by chance: -2.5), and that it blurs as well."""
    from matplotlib.figure import Figure

    def inner(y):                        # a border token sees zeros: other patterns
        return y[:, :, 16:-16, 16:-16]

    def crop(p, y, side=48):
        top, left = most_detail(inner(p.hq), side, -1)
        return inner(y)[:, :, top:top + side, left:left + side]
    one = list(map(restored(pix, m), held))
    p, y = max(zip(held, one), key=lambda pair: lattice_amplitude(crop(*pair)) -
               lattice_amplitude(crop(pair[0], pair[0].hq)))
    figure = Figure((18, 6), 90, layout="constrained")
    ys = {"HQ": p.hq, "one pass": y}
    ys |= {k: restored(pix, m, **how)(p) for k, how in PASSES.items()}
    axes = figure.subplots(2, len(ys) + 1)
    for line, (name, y) in zip(axes.T, ys.items()):
        flat = crop(p, y)
        show(line[0], (4 * (flat - flat.mean((2, 3), keepdim=True))).clamp(-1, 1), name,
             f"lattice {lattice_peak(inner(y)).item():+.1f} dB")
        power = torch.fft.fftshift(torch.fft.fft2(luma(inner(y))[0, 0])).abs().log()
        line[1].imshow(power.cpu(), cmap="gray")
        line[1].set(xticks=[], yticks=[])
    phases, k = (1, 2, 4, 8), torch.arange(8)
    means = [[inner(restored(pix, m, passes=2 * n, weight=1.0)(p)) for p in held]
             for n in phases]
    points = 10 * torch.cat([torch.div(*lattice_points(y)).log10() for y in means[0]]
                            ).mean(0).cpu()
    theory = [torch.where((k[:, None] + 3 * k).flatten() % n == 0, points, -2.5)[1:]
              .mean().item() for n in phases]
    hq = [inner(p.hq) for p in held]
    for axis, function, title in zip(axes[:, -1], (
            lambda y, _: lattice_peak(y), spectral_distance), (
            "lattice peak, dB", "spectral distance, dB")):
        axis.plot(phases, [sum(map(function, ys, hq)).item() / len(held) for ys in
                           means], "o-", label="mean over n phases")
        axis.set(xlabel="phases n", title=title, xticks=phases)
    axes[0, -1].plot(phases, theory, "s--", label="theory: n | k + 3 l")
    axes[0, -1].legend()
    write_file(file, lambda path: figure.savefig(path, format="png"))


# ---- 13. Command line (skim) ---------------------------------------------------------
def restore_files(args):
    """--input to --output: a picture, or a folder with all that is below it.

    Refuses before the work what cannot end well.  A folder goes on past bad files,
    lists them, and ends with exit code 1.  Alpha is resized beside the picture.
    """
    source, target = Path(args["input"]), Path(args.get("output", "up.png"))
    if not source.exists():
        raise UserError(f"{source}: no such file")
    jobs, kinds = {source: target}, Image.registered_extensions()
    if source.is_dir():
        jobs = {file: target / file.relative_to(source) for file in
                picture_files(source)}
    for file, output in jobs.items():
        for fault, wrong in {
                f"{output}: not a picture format to write":
                    kinds.get(output.suffix.lower()) not in Image.SAVE,
                f"{output}: no such folder":
                    not source.is_dir() and not output.parent.is_dir(),
                f"{output}: is the input": output.resolve() == file.resolve(),
                f"{target}: inside {source}":
                    source.resolve() in target.resolve().parents,
                f"{output}: a folder, not a file": output.is_dir(),
                f"{output}: exists; --force overwrites it":
                    output.exists() and "force" not in args}.items():
            if wrong:
                raise UserError(fault)
    method, failed = restorer_of(args), []
    for file, output in tqdm(jobs.items(), disable=quiet() or len(jobs) == 1 or None):
        try:
            picture = open_picture(file)
            up = to_pil(method(from_pil(picture).to(device())))
            kind = kinds[output.suffix.lower()]
            if picture.mode == "RGBA" and kind not in ("JPEG", "BMP"):     # no alpha
                up.putalpha(picture.getchannel("A").resize(up.size, Image.BICUBIC))
            output.parent.mkdir(parents=True, exist_ok=True)
            save = partial(up.save, **picture.info, quality=95, format=kind)
            write_file(output, save)
            print(f"{output}: {up.width}x{up.height}")
        except (UserError, OSError, ValueError, RuntimeError, MemoryError) as error:
            if not source.is_dir():
                raise
            failed.append(f"{file}: {error}")
    if failed:
        print(f"{len(failed)} of {len(jobs)} failed:", *failed, sep="\n",
              file=sys.stderr)
    return 1 if failed else 0


def restorer_of(args):
    """What --input asks for, as a function lq -> picture; the run's weights loaded."""
    name, scores = args.get("model", "pix"), args.get("degradation")
    passes = args.get("passes", 2 if "guidance" in args else 1)
    unread = {"resshift": {"passes", "guidance", "degradation"}}.get(
        name, {"guidance"} if passes == 1 else set()) & set(args)
    for fault, wrong in {
            "--degradation takes two numbers in [0, 1]":
                scores and not all(0 <= v <= 1 for v in scores),
            "--passes 4 and 8 are for --model pix": passes > 2 and name != "pix",
            "--scale takes 1 to 4": not 1 <= args.get("scale", 4) <= 4,
            "--tile takes 0 or a multiple of 8, 192 or more":
                args.get("tile", 0) % 8 or 0 != args.get("tile", 0) < 192,
            "one pass, or --model resshift, does not use "
            + ", ".join(f"--{k}" for k in sorted(unread)): unread}.items():
        if wrong:
            raise UserError(fault)
    run = Run(args["run"])
    scale = args.get("scale", run.cfg.scale)

    def side(lq):
        return args.get("tile", TILE * (lq[0, 0].numel() * scale ** 2 > 4 * TILE ** 2))
    if name == "resshift":               # of a tile already upsampled: scale 1
        chain = partial(sample, chapter_prior(run), chapter_end(run), scale=1)
        return lambda lq: tiled(chain, upsample(lq, scale), side(lq))
    m = all_chapters(run)
    return lambda lq: restore(
        m[name], m["estimator"], lq, scale, passes,
        args.get("guidance", run.cfg.guidance), side(lq),
        scores and torch.tensor([scores]).to(device()))


def run_bench(args):
    """--bench: counts beside the paper's, then time and memory of a preset."""
    cfg, size = config_from(args), args.get("size", 512)
    rows = counts(cfg, size) | {
        "paper, 512x512: GenDR": {"parameters": 933.0, "two": 1637.0},
        "paper, 512x512: GenDR-Pix": {"parameters": 866.0, "one": 344.0, "two": 744.0}}
    print_table(f"{size}x{size}: multiply-accumulates (G)", rows, {
        "parameters": ("parameters (M)", ".2f"), "one": ("one pass", ".1f"),
        "two": ("guided", ".1f")})
    benchmark(untrained(cfg), size)


COMMANDS = {                             # name: (argparse, the flags that it reads)
    "train": (dict(action="store_true", help="all chapters, and --eval"),
              (*TABLE, "size", "run")),
    "eval": (dict(action="store_true", help="the table of a finished run"),
             ("data", "size", "guidance", "run")),
    "bench": (dict(action="store_true", help="a preset, untrained: counts, time"),
              (*TABLE, "size")),
    "ablate": (dict(action="store_true", help="every claim a row, on a finished run"),
               ("ablate_steps", "row", "run")),
    "exact": (dict(action="store_true", help="chapter 0: one step, a table, a picture"),
              ()),
    "input": (dict(help="a picture to restore, or a folder"), (
        "output", "force", "model", "passes", "guidance", "tile", "degradation",
        "scale", "run"))}
TILE = 512                               # side of a tile, above 4 tiles' pixels
FLAGS = {
    "output": dict(help="--input: file or folder to write; up.png if left out"),
    "force": dict(action="store_true", help="--input: overwrite what exists"),
    "model": dict(choices=("resshift", "regression", *NAMES),
                  help="--input: pix if left out"),
    "row": dict(help="--ablate: only rows whose name contains this"),
    "passes": dict(type=int, choices=(1, 2, 4, 8), help="--input: 2 is PadCFG"),
    "tile": dict(type=int, help="--input: in squares of this many output pixels; 0: "
                 f"in one piece; if left out {TILE} above {2 * TILE}x{2 * TILE}"),
    "degradation": dict(type=float, nargs=2, metavar=("BLUR", "NOISE"),
                        help="--input: these scores in [0, 1], not the estimator's"),
    "data": dict(help="--eval: photos, or a folder with lq/ and hq/"),
    "size": dict(type=int, help="measure at this many output pixels squared; 512")}


def main():
    """python gendr_pix.py: train, evaluate, measure, or restore pictures."""
    started, (command, args) = time.time(), command_of(__doc__, COMMANDS, FLAGS)
    if args.get("size", 16) % 8 or args.get("size", 16) < 16:
        raise UserError("--size takes a multiple of 8, 16 or more")
    if {"size", "data"} <= set(args):
        raise UserError("--eval --data measures no time: it does not use --size")
    if args.get("ablate_steps", 1) < 1:
        raise UserError("--ablate-steps takes 1 or more")
    if command == "exact":
        return exact()
    if args.get("space") == "pixel":
        raise UserError("GenDR starts in latent space; resshift.py has --space pixel")
    if command in ("input", "bench"):
        return restore_files(args) if command == "input" else run_bench(args)
    finished = command in ("eval", "ablate")
    run = Run(args["run"]) if finished else None
    cfg = run.cfg if finished else config_from(args)
    if finished and not (run.folder / "pix.safetensors").exists():
        raise UserError(f"{run.folder}: not finished; --train first")
    if command == "ablate" and rank_and_size()[1] > 1:
        raise UserError("--ablate runs in one process")
    if not any(args.get("row", "") in row for row in ablation_rows(1, 128)):
        raise UserError("--row: none of " + ", ".join(ablation_rows(1, 128)))
    held = held_out(cfg, args.get("data"))
    pairs = None if command == "eval" else Pairs(cfg)
    lpips = Perceptual(cfg.lpips_net).to(device())
    run = run or Run(args["run"], cfg)
    if pairs:
        pairs.fill()
    m = all_chapters(run, pairs, lpips, held)
    if command == "ablate":
        return ablate(run, m, pairs, held, lpips, args.get(
            "ablate_steps", cfg.ablate_steps), args.get("row", "")) and 0
    if rank_and_size()[0] > 0:                                 # rank 0 evaluates
        return 0
    guidance = args.get("guidance", cfg.guidance)
    if "data" in args:
        table = evaluate(methods_of(m, guidance), held, lpips)
        print_table(f"mean; {lpips.name}", table, QUALITY)
        rows = [",".join(("picture", "draw", "method", *table["HQ"]["each"][0]))] + [
            ",".join(map(str, (json.dumps(p.name), p.draw, name, *e.values()))) for
            name, row in table.items() for p, e in zip(held, row["each"])]
        write_file(run.folder / "eval.csv", "\n".join(rows) + "\n")
        return print(f"per picture: {run.folder / 'eval.csv'}")
    passed = report(run, m, held, lpips, args.get("size", 512), guidance)
    print(f"\n{'PASS' if passed else 'FAIL'}: {run.folder}, "
          f"{(time.time() - started) / 60:.1f} minutes on {device()}, "
          f"{torch.get_num_threads()} threads, seed {cfg.seed}")
    return 0 if passed else 1


if __name__ == "__main__":
    command_line(main)
