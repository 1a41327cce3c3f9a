"""ResShift: super-resolution by shifting the residual (chapters 0 and 1, complete).

A restored photograph is the end of a short Markov chain that starts at the degraded
one.  First the method: chain, U-Net, ends, training.  Then the machinery: degradation,
metrics, files, flags.  `gendr_pix.py` (chapters 2 to 4) imports its names from here.

Papers: ResShift, arXiv 2307.12348 (NeurIPS 2023), journal version 2403.07319.
        Degradation: Real-ESRGAN, arXiv 2107.10833; mild ranges: S3Diff, 2409.17058.

    python resshift.py --exact                          chapter 0: seconds, a table
    python resshift.py --train --tiny                   minutes on 2 CPU cores; a table
    python resshift.py --train --tiny --space pixel --run runs/pixel    no autoencoder

Symbols: B batch, C channels, H W full resolution, h w latent resolution, f = 8;
         x0 clean, y0 degraded (upsampled to x0's size), e0 = y0 - x0, t = 1 .. T.
Ranges:  images are float in [-1, 1] inside, [0, 1] in metrics, uint8 in files.
"""
import argparse
import csv
import dataclasses
import hashlib
import importlib.util
import io
import json
import math
import os
import random
import sys
import time
import warnings
import zlib
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

if {"-h", "--help"} & set(sys.argv) and Path(sys.argv[0]).stem in (
        "resshift", "gendr_pix"):        # help needs no torch, and not its two seconds
    sys.modules.update(dict.fromkeys(("torch", "safetensors.torch", *(
        f"torch.{name}" for name in (
            "nn", "nn.functional", "utils", "utils.benchmark", "utils.checkpoint",
            "utils.data", "utils.flop_counter"))), MagicMock()))

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# ---- 1. Every number (read) --------------------------------------------------------
# Three values: the presets tiny (CPU, minutes), small (the default: one GPU, hours) and
# full (Stable Diffusion 2.1's size); one value serves all.
PRESETS = ("tiny", "small", "full")
TABLE = dict(
    # data
    train_data="tiny_data/train", val_data="tiny_data/val", scale=4,
    val_draws=3,                         # degradations of each held-out picture
    crop=(128, 256, 512),                # HQ training crop, pixels
    pool=(1536, 0, 0),                   # pairs kept in memory; 0: new ones every step
    workers=(0, 8, 8),                   # processes that make pairs
    ranges=("light", "mild", "mild"),    # of the degradation: a row of RANGES
    # the chain (ResShift)
    space="latent",                      # "latent": VAE; "pixel": pixel-unshuffle
    steps=15, kappa=2.0, power=0.3,      # T; noise strength; p, the shifting speed
    eta_1=0.0, eta_T=0.999,              # 0: the paper's min((0.04 / kappa)^2, 0.001)
    # the networks
    unet_widths=((48, 96, 144), (128, 256, 384, 384), (320, 640, 1280, 1280)),
    unet_blocks=(1, 2, 2), groups=(16, 32, 32),        # residual blocks a level
    head_width=(48, 64, 64),             # channels of one attention head
    context_tokens=(4, 77, 77), context_width=(64, 256, 1024),
    shortcut=(True, True, False),        # add the input to the U-Net's output
    latent_channels=16,
    vae_widths=((24, 48, 64, 64), (64, 128, 256, 256), (128, 128, 256, 512)),
    vae_blocks=(1, 2, 2), vae_groups=(8, 32, 32),
    vae_skip=(True, True, False),        # linear skip around encoder and decoder
    lora_rank=(16, 32, 32), vae_lora_rank=(0, 0, 16),  # of the VAE encoder; 0: frozen
    adapter="guided",                    # GenDR's LoRA: "guided", "plain", or "full"
    fake_rank=(16, 64, 64),              # LoRA of the fake score network
    estimator_width=(16, 48, 48),
    # training
    batch=(8, 16, 8), estimator_batch=32, vae_crop=(64, 128, 256),
    vae_steps=(10, 30_000, 500_000), prior_steps=(2050, 100_000, 500_000),
    estimator_steps=(1600, 5000, 20_000),
    start_steps=(300, 30_000, 80_000), gendr_steps=(100, 10_000, 20_000),
    adc_steps=(50, 20_000, 100_000), pix_steps=(150, 30_000, 100_000),
    ablate_steps=(40, 4000, 10_000),     # of a chapter, for each row of --ablate
    learning_rate=(5e-4, 1e-4, 1e-5),    # of the prior
    vae_learning_rate=(1e-5, 5e-4, 1e-4), estimator_learning_rate=(3e-3, 1e-3, 1e-3),
    start_learning_rate=(1e-3, 5e-5, 1e-5), gendr_learning_rate=(5e-4, 5e-5, 1e-5),
    fake_learning_rate=(1e-3, 1e-4, 1e-4),
    student_learning_rate=(3e-4, 5e-5, 5e-5),    # stages I and II
    critic_learning_rate=(1e-3, 1e-4, 1e-4),
    warmup=(20, 200, 200), ema=(0.99, 0.999, 0.999), clip=1.0,     # gradient norm
    vae_kl=1e-6, negative=0.05,          # share of online negatives (S3Diff)
    guidance=1.07,                       # S3Diff's weight; GenDR-Pix prints none
    distill="vsd", xi=1.0,               # "none", "vsd", "sid" or "cid"; SiD's alpha
    cid_guidance=1.5,                    # f_phi's; xi and the next 3 are open in GenDR
    distill_t=5,                         # t is drawn in 1 .. min(distill_t, T)
    lambda_distill=1.0, lambda_distill_adv=0.0,
    lambda_mean=10.0,                    # ours: of the error of a latent's mean
    fake_steps=1,                        # fake score steps for each of the generator;
                                         # 0: the exact fake score, z_g itself
    lambda_adv=0.05, lambda_lpips=1.0, lambda_fourier=0.1,     # GenDR-Pix's stage II
    least_squares=True, repeated=False,  # new ends start in closed form; else plainly,
                                         # or from the old end's weights, repeated
    pad_phases=8, mask_radius=1,         # random padding, 1: none; Fourier mask, bins
    critic="adc", teacher="gendr",       # stage II's features; both stages': or "hq"
    lpips_net=("alex", "vgg", "vgg"),
    # the run; the weights to start from are SD 2.1's U-Net and an AutoencoderKL
    unet_weights="", vae_weights="",     # as .safetensors, under diffusers' names
    seed=0, precision=("fp32", "bf16", "bf16"),            # autocast, on CUDA alone
    checkpointing=(False, False, True),  # U-Net activations again in the backward pass
    save_every=(200, 1000, 1000), log_every=(50, 200, 200))

Config = dataclasses.make_dataclass("Config", [
    (k, type(v), v) for k, v in ((k, v[1] if isinstance(v, tuple) else v)
                                 for k, v in TABLE.items())], frozen=True)
Config.__module__ = __name__             # so that it can be pickled, for workers
Config.__doc__ = """Every number of both scripts, frozen; the defaults are small's."""


def preset(name):
    """The `Config` called "tiny", "small" or "full"."""
    return Config(**{k: v[PRESETS.index(name)] if isinstance(v, tuple) else v
                     for k, v in TABLE.items()})


# ---- 2. The residual-shifting chain (read) -- ResShift, Eqs. 1-10 --------------------
class ResidualShift:
    """The Markov chain from a clean x0 (t = 0) to a noisy copy of y0 (t = T).

    Schedule, ResShift Eqs. 8-10, in terms of sqrt(eta):
        sqrt(eta_t) = sqrt(eta_1) b0^beta_t,  beta_t = ((t-1)/(T-1))^p (T-1),
        b0 = exp( ln(eta_T / eta_1) / (2 (T-1)) ),  eta_1 = min((0.04/kappa)^2, 0.001)
    and alpha_t = eta_t - eta_(t-1).  `eta` and `alpha` are float32 of shape (T+1,),
    indexed by the paper's t; eta[0] = 0 so that every formula reads as printed.
    All tensors x are (B, C, h, w); t is a (B,) integer tensor with values in 1 .. T.

    Bridge to the official code: it stores sqrt(eta), from min_noise_level / kappa to
    etas_end.  Its released models are `ResidualShift(4, eta_1=0.1**2, eta_T=0.99**2)`
    and `ResidualShift(15, eta_1=0.02**2, eta_T=0.99**2)`; squaring is the classic slip.
    Raises ValueError for fewer than 2 steps or unless 0 < eta_1 < eta_T < 1.
    """

    def __init__(self, steps=15, kappa=2.0, power=0.3, eta_1=None, eta_T=0.999):
        if eta_1 is None:
            eta_1 = min((0.04 / kappa) ** 2, 0.001)
        if steps < 2 or not 0 < eta_1 < eta_T < 1:
            raise ValueError(f"need steps >= 2 and 0 < eta_1 < eta_T < 1, got {steps}, "
                             f"{eta_1}, {eta_T}")
        self.steps, self.kappa, self.power, self.eta_T = steps, kappa, power, eta_T
        b0 = math.exp(math.log(eta_T / eta_1) / (2 * (steps - 1)))
        beta = [(i / (steps - 1)) ** power * (steps - 1) for i in range(steps)]
        eta = [0.0] + [(math.sqrt(eta_1) * b0 ** b) ** 2 for b in beta]
        alpha = [eta[0]] + [b - a for a, b in zip(eta, eta[1:])]
        self.eta, self.alpha = (torch.tensor(v, device="cpu") for v in (eta, alpha))

    @staticmethod
    def at(values, t, like):
        """values[t] on the device of `like`, shaped (B, 1, 1, 1)."""
        return values.to(like.device)[t.to(like.device)].view(-1, 1, 1, 1)

    def q_step(self, x_prev, x0, y0, t, noise):
        """Eq. 1: x_t ~ N( x_(t-1) + alpha_t e0, kappa^2 alpha_t I ), given N(0, I)."""
        alpha = self.at(self.alpha, t, x_prev)
        return x_prev + alpha * (y0 - x0) + self.kappa * alpha.sqrt() * noise

    def q_sample(self, x0, y0, t, noise):
        """Eq. 2: x_t ~ N( x0 + eta_t e0, kappa^2 eta_t I ), the chain in one stride."""
        eta = self.at(self.eta, t, x0)
        return x0 + eta * (y0 - x0) + self.kappa * eta.sqrt() * noise

    def posterior(self, x_t, x0, t):
        """Eq. 6: q(x_(t-1) | x_t, x0, y0) -> (mean, variance).

        mean = (eta_(t-1)/eta_t) x_t + (alpha_t/eta_t) x0,  variance = kappa^2
        (eta_(t-1)/eta_t) alpha_t, shaped (B, 1, 1, 1).  y0 has cancelled.  At t = 1
        the mean is x0 itself and the variance 0: the last step adds no noise.
        """
        eta, alpha = self.at(self.eta, t, x_t), self.at(self.alpha, t, x_t)
        eta_prev = self.at(self.eta, t - 1, x_t)
        mean = eta_prev / eta * x_t + alpha / eta * x0
        return mean, self.kappa ** 2 * eta_prev / eta * alpha

    def prior_sample(self, y0, noise):
        """Sec. 2.1: x_T = y0 + kappa sqrt(eta_T) noise; eta_T is close to 1."""
        return y0 + self.kappa * math.sqrt(self.eta_T) * noise

    def input_scale(self, eta, pixel=False):
        """The factor on the copy of x_t that the network sees, as published.

        Latents: to variance 1, if x0 and y0 have variance 1 and are fully correlated.
        Pixels in [-1, 1]: so that three sigma of noise still fit.
        """
        return 1 / (3 * self.kappa * eta ** 0.5 + 1 if pixel else
                    (self.kappa ** 2 * eta + 1) ** 0.5)

    @torch.no_grad()
    def sample(self, model, y0, generator=None):
        """Run the chain from x_T down to x_0; `model(x_t, y0, t)` predicts x0.

        No strides: the posterior between any two times has the same form, but the
        network was taught at these T times alone.
        """
        x = self.prior_sample(y0, noise_like(y0, generator))
        for step in range(self.steps, 0, -1):
            t = torch.full((len(y0),), step)
            x, variance = self.posterior(x, model(x, y0, t), t)
            if step > 1:
                x = x + variance.sqrt() * noise_like(y0, generator)
        return x


def noise_like(x, rng):
    """N(0, I) in x's shape from a CPU generator, so that all devices draw alike."""
    return torch.randn(x.shape, generator=rng, device="cpu").to(x)


# ---- 3. Chapter 0: the exact world (read) -- two pixels, nothing to train ------------
class ExactWorld:
    """Photographs of two pixels, x0 = (mean, detail), shaped (B, 2, 1, 1): a mixture of
    24 Gaussians of deviation 0.05 on a figure of eight, each axis of unit variance.
    y0 = (mean + 0.3 noise, 0.05 noise): the detail is lost.  Not in the papers."""
    STD, NOISE, SEEN = 0.05, torch.tensor([0.3, 0.05]), torch.tensor([1.0, 0.0])

    def __init__(self):
        angle = 2 * math.pi * (torch.arange(24) + 0.5) / 24
        self.centres = math.sqrt(2) * torch.stack([angle.cos(), (2 * angle).sin()], 1)

    def draw(self, count, rng):
        """(x0, y0): `count` photographs and their degraded copies."""
        which = torch.randint(len(self.centres), (count,), generator=rng)
        noise = torch.randn(2, count, 2, generator=rng)
        x0 = self.centres[which] + self.STD * noise[0]
        y0 = x0 * self.SEEN + self.NOISE * noise[1]
        return x0[:, :, None, None], y0[:, :, None, None]

    def denoise(self, y0, chain=None, x_t=None, t=None):
        """E[x0 | x_t, y0], without a chain E[x0 | y0]: what a network could do at best.

        Each pixel is seen with a precision p three times: at the centre of component k,
        in y0, and in (x_t - shift) / gain, read off the affine `q_sample`.  Gaussians'
        products: mean_k = sum p v / sum p, weight_k ~ exp( -sum p (v - mean_k)^2 / 2 ).
        """
        seen = [(self.centres, torch.tensor(self.STD ** -2)),
                (y0.view(-1, 1, 2), self.SEEN / self.NOISE ** 2)]
        if chain:
            one, zero = torch.ones_like(y0), torch.zeros_like(y0)
            shift = chain.q_sample(zero, y0, t, zero)
            gain = chain.q_sample(one, y0, t, zero) - shift
            precision = (gain / chain.q_sample(zero, zero, t, one)) ** 2
            seen.append([v.view(-1, 1, 2) for v in ((x_t - shift) / gain, precision)])
        mean = sum(v * p for v, p in seen) / sum(p for _, p in seen)       # (B, 24, 2)
        misfit = sum(p * (v - mean) ** 2 for v, p in seen).sum(2, keepdim=True)
        return (torch.softmax(-misfit / 2, 1) * mean).sum(1)[:, :, None, None]


class FromNoise(ResidualShift):
    """The opponent: DDPM (2006.11239) with x_T ~ N(0, I) and the same `sample`;
    a_t = prod(1 - beta) at T of the 1000 times of LDM's schedule (2112.10752)."""

    def __init__(self, steps):
        beta = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64)
        a = (1 - beta ** 2).cumprod(0)[torch.linspace(-1, 999, steps + 1).long()[1:]]
        self.steps, self.a = steps, torch.cat([torch.ones(1), a.float()])

    def q_sample(self, x0, y0, t, noise):
        """DDPM Eq. 4: x_t ~ N( sqrt(a_t) x0, (1 - a_t) I ); y0 plays no part."""
        a = self.at(self.a, t, x0)
        return a.sqrt() * x0 + (1 - a).sqrt() * noise

    def posterior(self, x_t, x0, t):
        """DDPM Eqs. 6-7, a = a_t, b = a_(t-1): mean = sqrt(b) x0 + k (x_t - sqrt(a) x0)
        with k = sqrt(a/b) (1 - b)/(1 - a);  variance = (1 - b)/(1 - a) (1 - a/b)."""
        a, b = self.at(self.a, t, x_t), self.at(self.a, t - 1, x_t)
        share = (1 - b) / (1 - a)
        mean = b.sqrt() * x0 + (a / b).sqrt() * share * (x_t - a.sqrt() * x0)
        return mean, share * (1 - a / b)

    def prior_sample(self, y0, noise):
        """x_T ~ N(0, I), whatever y0."""
        return noise


def exact_measures(world, x, x0, y0):
    """MSE to x0 (fidelity); distance to the nearest centre (realism); energy distance
    of (x, y0) to (x0, y0) of other draws, x 1000: about 0 for the true posterior."""
    (x, x0, y0), n = (v.flatten(1) for v in (x, x0, y0)), len(x)
    a, b = torch.cat([x, y0], 1), torch.cat([x0, y0], 1)
    energy = 2 * torch.cdist(a, b) - torch.cdist(a, a) - torch.cdist(b, b)
    return {"mse": (x - x0).square().sum(1).mean().item(), "distance": torch.cdist(
        x, world.centres).amin(1).mean().item(),
        "energy": 1000 * (energy.sum() - energy.trace()).item() / (n * (n - 1))}


def exact_table(title, rows, file, columns=(), seeds=3, count=2000):
    """A table, and a figure with a panel of each, of rows {name: function(world, y0,
    rng) -> (points x_T .. x_0, numbers)}: the points x_0, and the paths of five."""
    from matplotlib.figure import Figure
    world, found, side = ExactWorld(), {}, math.isqrt(len(rows)) + 1
    figure = Figure((4.5 * side, 4 * side), 70, layout="constrained")
    axes = figure.subplots(side, side).flatten()
    for i, (name, row) in enumerate(rows.items()):
        for seed in reversed(range(seeds)):
            rng = torch.Generator().manual_seed(seed)
            x0, y0 = world.draw(count, rng)
            points, numbers = row(world, y0, rng)
            measured = exact_measures(world, points[-1], x0, y0) | numbers
            found.setdefault(name, []).append(measured)
        axes[i].plot(*points[-1][:600].flatten(1).T, ".", ms=3)
        axes[i].plot(*torch.stack(points)[:, :5].flatten(2).permute(2, 0, 1), lw=0.8)
        axes[i].plot(*world.centres.T, "k+")
        axes[i].set(title=name, xlabel="mean", ylabel="detail", xlim=(-2.2, 2.2),
                    ylim=(-2.2, 2.2))
        axes[-1].semilogy(measured["mse"], measured["distance"], "os^D"[i // 4],
                          label=name)
    axes[-1].set(xlabel="MSE to x0 (fidelity)", ylabel="distance (realism)")
    axes[-1].legend(fontsize=7)
    write_file(file, lambda path: figure.savefig(path, format="png"))
    columns = {"mse": ("MSE to x0", ".2f"), "distance": ("distance", ".3f"),
               "energy": ("energy", ".1f"), **dict(columns)}
    print_table(title, {k: spread(v, columns) for k, v in found.items()}, columns)


def exact():
    """--exact: what chapter 1 claims, in the exact world."""
    def row(chain, world, y0, rng):
        path = []

        def model(x, y, t):
            path.append(x)
            return world.denoise(y, chain, x, t)
        path.append(chain.sample(model, y0, rng) if chain else world.denoise(y0))
        return path, {}
    exact_table("chapter 0, 3 seeds", {name: partial(row, chain) for name, chain in {
        "the exact mean": None,
        **{f"ResShift, T = {n}": ResidualShift(n) for n in (4, 8, 15, 30)},
        **{f"from noise, T = {n}": FromNoise(n) for n in (4, 8, 15, 30)},
        **{f"kappa = {k:g}": ResidualShift(15, k) for k in (0.5, 8, 32)},
        **{f"p = {p:g}": ResidualShift(15, power=p) for p in (0.1, 0.8, 2)}}.items()},
        "exact.png")
    print("""
The mean has the least error there is, and lies off the curve: that is what blur is.
A faithful sample has about twice the mean's error, and lies on the curve.
Residual shifting needs about half the steps of a chain from noise for one distance.
kappa and p trade fidelity against realism: less error, more distance.""")


# ---- 4. The U-Net (read) -- Stable Diffusion 2.1's, at any width ---------------------
# Module names are those of diffusers' UNet2DConditionModel, so that real weights load.
class ResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, plus a shortcut; time enters between."""

    def __init__(self, in_ch, out_ch, groups, time_width=0, eps=1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_ch, eps)
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, out_ch) if time_width else None
        self.norm2 = nn.GroupNorm(groups, out_ch, eps)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else None

    def forward(self, x, emb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if emb is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v over tokens (B, N, C), of x itself or of context."""

    def __init__(self, width, heads, context_width=None, bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width or width, width, bias=bias)
        self.to_v = nn.Linear(context_width or width, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in
                   (self.to_q(x), self.to_k(context), self.to_v(context)))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](rearrange(y, "b h n d -> b n (h d)"))


class Transformer(nn.Module):
    """On the pixels of a feature map: self-attention, cross-attention to the prompt,
    GEGLU feed-forward (a * gelu(b), the halves of one linear layer), each residual."""

    def __init__(self, width, cfg):
        super().__init__()
        heads = max(1, width // cfg.head_width)
        self.norm = nn.GroupNorm(cfg.groups, width, 1e-6)
        self.proj_in = nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([nn.ModuleDict({
            "norm1": nn.LayerNorm(width), "attn1": Attention(width, heads),
            "norm2": nn.LayerNorm(width),
            "attn2": Attention(width, heads, cfg.context_width),
            "norm3": nn.LayerNorm(width), "ff": nn.ModuleDict({"net": nn.ModuleList([
                nn.ModuleDict({"proj": nn.Linear(width, 8 * width)}), nn.Identity(),
                nn.Linear(4 * width, width)])})})])
        self.proj_out = nn.Linear(width, width)

    def forward(self, x, context):
        norm1, attn1, norm2, attn2, norm3, ff = self.transformer_blocks[0].values()
        h = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        h = h + attn1(norm1(h))
        h = h + attn2(norm2(h), context)
        a, b = ff["net"][0]["proj"](norm3(h)).chunk(2, dim=-1)
        h = self.proj_out(h + ff["net"][2](a * F.gelu(b)))
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


class Resample(nn.Module):
    """Half the resolution by a convolution, or (up) double it, nearest, and convolve.
    asymmetric: padded below and to the right only, as in Stable Diffusion's VAE."""

    def __init__(self, width, up=False, asymmetric=False):
        super().__init__()
        self.up, self.asymmetric = up, asymmetric
        self.conv = nn.Conv2d(width, width, 3, stride=1 if up else 2,
                              padding=0 if asymmetric else 1)

    def forward(self, x, size=None):     # size: of the U-Net's skip, perhaps odd
        if self.up:
            size = size or (2 * x.shape[2], 2 * x.shape[3])
            x = F.interpolate(x, size=size, mode="nearest")
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Block(nn.Module):
    """One level: residual blocks, attentions behind them, a change of resolution.

    channels: (in, out) of each residual block.  In the U-Net every result goes into
    `keep` on the way down, and comes back out of `take` on the way up.  With `again`
    activations are computed again in the backward pass: time for memory.
    """
    again = False

    def __init__(self, channels, groups, time_width=0, eps=1e-5, attentions=(),
                 down=None, up=None):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResBlock(i, o, groups, time_width, eps) for i, o in channels])
        self.attentions = nn.ModuleList([make() for make in attentions])
        self.downsamplers = nn.ModuleList([down()] if down else [])
        self.upsamplers = nn.ModuleList([up()] if up else [])

    def forward(self, x, emb=None, context=None, keep=None, take=None):
        keep, call = keep or (lambda x: x), lambda module, *inputs: module(*inputs)
        if self.again and torch.is_grad_enabled():
            call = partial(checkpoint, use_reentrant=False)
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            x = call(resnet, torch.cat([x, take.pop()], dim=1) if take else x, emb)
            x = keep(call(attention, x, context) if attention else x)
        for down in self.downsamplers:
            x = keep(down(x))
        for up in self.upsamplers:
            x = up(x, take and take[-1].shape[2:])
        return x


class UNet(nn.Module):
    """Stable Diffusion 2.1's U-Net.  forward(x, t, context) -> x.

    x (B, in_channels, h, w) -> (B, out_channels, h, w), any h and w; t (B,) in
    0 .. 999; context (B, tokens, context_width).  The middle attends, and all
    levels but the lowest.
    """

    def __init__(self, cfg, in_channels, out_channels):
        super().__init__()
        w, n, time = cfg.unet_widths, cfg.unet_blocks, 4 * cfg.unet_widths[0]
        self.cfg, last = cfg, len(w) - 1

        def level(channels, attend, **change):
            attend = attend * [lambda: Transformer(channels[-1][1], cfg)]
            block = Block(channels, cfg.groups, time, attentions=attend, **change)
            block.again = cfg.checkpointing
            return block
        self.conv_in = nn.Conv2d(in_channels, w[0], 3, padding=1)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(w[0], time),
                                             "linear_2": nn.Linear(time, time)})
        self.down_blocks, skips = nn.ModuleList(), [w[0]]
        for i, width in enumerate(w):
            channels = [(w[max(i - 1, 0)], width)] + [(width, width)] * (n - 1)
            down = (lambda: Resample(width)) if i < last else None
            self.down_blocks.append(level(channels, n * (i < last), down=down))
            skips += [width] * (n + (i < last))
        self.mid_block = level([(w[-1], w[-1])] * 2, 1)
        self.up_blocks, ch = nn.ModuleList(), w[-1]
        for i, width in reversed(list(enumerate(w))):
            channels = [(c + skips.pop(), width) for c in [ch] + [width] * n]
            up, ch = (lambda: Resample(width, up=True)) if i > 0 else None, width
            self.up_blocks.append(level(channels, (n + 1) * (i < last), up=up))
        self.conv_norm_out = nn.GroupNorm(cfg.groups, w[0], 1e-5)
        self.conv_out = nn.Conv2d(w[0], out_channels, 3, padding=1)
        # Residual branches start at zero, for training from scratch (not in the paper),
        # and so does the step away from the input.
        for name, p in self.named_parameters():
            if ".conv2." in name or ".proj_out." in name or (
                    cfg.shortcut and name.startswith("conv_out.")):
                nn.init.zeros_(p)

    def embed(self, t):
        """t (B,) -> (cos, sin) of t 10000^(-i/half), then two linear layers."""
        half = self.conv_in.out_channels // 2
        i = torch.arange(half, device=t.device, dtype=torch.float32)
        angle = t.float()[:, None] * torch.exp(-math.log(10000) * i / half)
        emb = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.conv_in.weight.dtype)
        one, two = self.time_embedding.values()
        return two(F.silu(one(emb)))

    def encode(self, x, t, context):
        """The half before the skips return: (features, skips, time embedding)."""
        emb, h = self.embed(t.to(x.device)), self.conv_in(x)   # h: (B, w0, h, w)
        skips = [h]
        for block in self.down_blocks:                         # (B, wi, h/2^i, w/2^i)
            h = block(h, emb, context, keep=lambda x: skips.append(x) or x)
        return self.mid_block(h, emb, context), skips, emb

    def forward(self, x, t, context):
        h, skips, emb = self.encode(x, t, context)
        for block in self.up_blocks:
            h = block(h, emb, context, take=skips)
        return self.conv_out(F.silu(self.conv_norm_out(h)))    # (B, out, h, w)


POSITIVE, NEGATIVE = 0, 1


class Prompts(nn.Module):
    """Two learned contexts in place of a text encoder: GenDR's two fixed prompts."""

    def __init__(self, cfg):
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, cfg.context_tokens, cfg.context_width))

    def forward(self, prompt, batch):
        """prompt: POSITIVE, NEGATIVE or a (B,) tensor of them -> (B, tokens, width)."""
        return self.table[prompt].expand(batch, -1, -1)


# ---- 5. The two kinds of ends (read) -- VAE, or pixel-(un)shuffle --------------------
class PixelShuffle(nn.Module):
    """The end without parameters: (B, 3, H, W) <-> (B, 3 f^2, H/f, W/f), lossless."""

    def __init__(self, factor=8):
        super().__init__()
        self.factor, self.channels = factor, 3 * factor ** 2

    def encode(self, x):
        """Every f x f patch becomes the channels of one token; torch's order."""
        return F.pixel_unshuffle(x, self.factor)

    def decode(self, z):
        """The inverse of `encode`."""
        return F.pixel_shuffle(z, self.factor)


class VaeAttention(Attention):
    """Single-head self-attention on a feature map, in the middle of the VAE."""

    def __init__(self, width, groups):
        super().__init__(width, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, width, 1e-6)

    def forward(self, x, context=None):
        h = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        return x + rearrange(super().forward(h), "b (h w) c -> b c h w", h=x.shape[2])


class VaeHalf(nn.Module):
    """Encoder (B, in_ch, 8h, 8w) -> (B, out_ch, h, w), or with `up` its mirror.

    Four levels, three changes of resolution; the decoder has one block more a level.
    """

    def __init__(self, cfg, in_ch, out_ch, up):
        super().__init__()
        w, g = cfg.vae_widths[::-1] if up else cfg.vae_widths, cfg.vae_groups
        middle, more = w[0] if up else w[-1], cfg.vae_blocks + up - 1

        def levels():
            for i, width in enumerate(w):
                change = (lambda: Resample(width, up, asymmetric=not up)) if (
                    i < 3) else None
                yield Block([(w[max(i - 1, 0)], width)] + [(width, width)] * more, g,
                            eps=1e-6, **{"up" if up else "down": change})
        self.conv_in = nn.Conv2d(in_ch, w[0], 3, padding=1)
        self.down_blocks = nn.ModuleList([] if up else levels())
        self.mid_block = Block([(middle, middle)] * 2, g, eps=1e-6,
                               attentions=[lambda: VaeAttention(middle, g)])
        self.up_blocks = nn.ModuleList(levels() if up else [])
        self.conv_norm_out = nn.GroupNorm(g, w[-1], 1e-6)
        self.conv_out = nn.Conv2d(w[-1], out_ch, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            h = block(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


@torch.no_grad()
def fit_conv(conv, x, y, ridge=1e-4):
    """Set a stride-1 convolution to the least-squares map from x to y: (B, ., h, w).

    Normal equations in float64; the ridge is relative to the patches' mean variance.
    Not in the papers, nor is what it starts.
    """
    k = conv.kernel_size[0]
    x = rearrange(F.unfold(x, k, padding=k // 2), "b c n -> (b n) c").double()
    y = rearrange(y, "b c h w -> (b h w) c").double()
    mx, my = x.mean(0), y.mean(0)
    x, y = x - mx, y - my
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, x.T @ y)
    conv.weight.copy_(weight.T.reshape(conv.weight.shape))
    conv.bias.copy_(my - mx @ weight)


class VAE(nn.Module):
    """AutoencoderKL with f = 8 and 16 channels: the end of chapters 1 and 2.

    Small presets add a linear skip around each half (`vae_skip`, not in the paper): a
    1x1 convolution from the 192 channels of pixel-unshuffle to the latent, and a 3x3
    back, so that a patch is drawn from its neighbours too: less of an 8x8 grid.  They
    start in closed form, and the convolutions beside them at zero.
    """

    def __init__(self, cfg):
        super().__init__()
        c = self.channels = cfg.latent_channels
        self.factor = 8
        self.encoder = VaeHalf(cfg, 3, 2 * c, up=False)
        self.decoder = VaeHalf(cfg, c, 3, up=True)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)
        self.register_buffer("scale", torch.ones(()))
        self.shuffle = PixelShuffle(self.factor) if cfg.vae_skip else None
        if cfg.vae_skip:
            self.skip_in = nn.Conv2d(self.shuffle.channels, c, 1)
            self.skip_out = nn.Conv2d(c, self.shuffle.channels, 3, padding=1)

    @torch.no_grad()
    def start_linear(self, images):
        """skip_in: the principal axes V of 8x8 patches, z = g V^T (patch - mean), g for
        unit variance.  skip_out: the least-squares way back.  Logvar starts at -6."""
        x = rearrange(self.shuffle.encode(images).double(), "b c h w -> (b h w) c")
        variance, axes = torch.linalg.eigh(torch.cov(x.T))
        axes = axes[:, -self.channels:].T * variance[-self.channels:].mean().rsqrt()
        self.skip_in.weight.copy_(axes[:, :, None, None])
        self.skip_in.bias.copy_(-axes @ x.mean(0))
        for p in (*self.quant_conv.parameters(), *self.decoder.conv_out.parameters()):
            p.zero_()
        self.quant_conv.bias[self.channels:] = -6.0
        y = self.shuffle.encode(images)
        fit_conv(self.skip_out, self.skip_in(y), y)

    def posterior(self, x):
        """q(z | x) = N(mean, exp(logvar)): two (B, 16, H/8, W/8)."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        if self.shuffle:
            mean = mean + self.skip_in(self.shuffle.encode(x))
        return mean, logvar.clamp(-30, 20)

    def encode(self, x):
        """(B, 3, H, W) -> z (B, 16, H/8, W/8): scale times the mean, never a sample."""
        return self.posterior(x)[0] * self.scale               # scale: unit variance

    def decode(self, z):
        """z (B, 16, h, w) -> image (B, 3, 8 h, 8 w) in [-1, 1], not clamped."""
        z = z / self.scale
        y = self.decoder(self.post_quant_conv(z))
        return y + self.shuffle.decode(self.skip_out(z)) if self.shuffle else y


class ResShift(nn.Module):
    """f(x_t, y0, t): the prior of all chapters.  It predicts the clean x0.

    Input: x_t, scaled (`input_scale`), beside y0: 2 C channels.  The U-Net reads t as
    999 t / T, so that T meets Stable Diffusion's last timestep.  With cfg.shortcut the
    U-Net predicts x0 - y0 (small presets; not in the paper).
    """

    def __init__(self, cfg):
        super().__init__()
        self.chain = ResidualShift(cfg.steps, cfg.kappa, cfg.power,
                                   cfg.eta_1 or None, cfg.eta_T)
        self.pixel, self.shortcut = cfg.space == "pixel", cfg.shortcut
        channels = 192 if self.pixel else cfg.latent_channels
        self.unet = UNet(cfg, 2 * channels, channels)
        # Noise would drown y0 at first: x_t's weights start at zero (not in the paper).
        nn.init.zeros_(self.unet.conv_in.weight[:, :channels])
        self.prompts = Prompts(cfg)

    def forward(self, x_t, y0, t, prompt=POSITIVE):
        eta = self.chain.at(self.chain.eta, t, x_t)
        x = torch.cat([x_t * self.chain.input_scale(eta, self.pixel), y0], dim=1)
        out = self.unet(x, 999 * t / self.chain.steps, self.prompts(prompt, len(y0)))
        return y0 + out if self.shortcut else out


# ---- 6. What teaches them (read) -- a step is a generator that yields players --------
# A stage is (step, rates).  step(batch, draws) computes, yields a player (a module) and
# its losses {name: scalar}, and goes on when `train` has made that player's gradient
# step: what one leaves for the next is a local variable.  rates: {player: rate}.
class Batch(SimpleNamespace):
    """One training batch, float32 on the device; what is missing is filled when read.

    hq        (B, 3, H, W)      [-1, 1]        a crop of a photograph       `Pairs`
    lq        (B, 3, H/s, W/s)  [-1, 1]        hq degraded, 8-bit levels    `Pairs`
    scores    (B, 2)            [0, 1]         its true blur, noise         `Pairs`
    lq_up     (B, 3, H, W)      [-1, 1]        lq, bicubic                  `upsample`
    z_hq      (B, C, h, w)      variance 1     encode(hq)                   chapter 1
    z_lq      (B, C, h, w)      like z_hq      encode(lq_up)                chapter 1
    estimate  (B, 2)            (0, 1)         scores seen in lq            estimator
    z_tea     (B, C, h, w)      like z_hq      GenDR's latent               chapter 2
    y_tea     (B, 3, H, W)      about [-1, 1]  GenDR's picture              chapter 2

    The last five are outputs of frozen networks (`Pairs.add`, at each chapter's end).
    They come unrounded: 8 bits would teach a grid of 1/255.
    """

    def __getattr__(self, name):         # only called where a field is missing
        teacher = self.__dict__.get("teachers", {}).get(name)
        if teacher is None:
            raise AttributeError(f"nobody fills this batch's {name}")
        with torch.no_grad():
            setattr(self, name, teacher(self).float())
        return self.__dict__[name]


class Draws:
    """The random numbers of one step, from the CPU, so that all devices draw alike.

    Under torchrun each process draws for the whole batch and keeps its share: N see
    what one with N times the batch would.  `dice`: for what the whole batch shares.
    """

    def __init__(self, seed):
        self.rng, self.dice = torch.Generator().manual_seed(seed), random.Random(seed)

    def each(self, draw, count, *size, **how):
        """This process's share of draw: torch.rand, torch.randn, torch.randint."""
        (rank, n), size = rank_and_size(), (rank_and_size()[1] * count, *size)
        return draw(size=size, generator=self.rng, device="cpu", **how).chunk(n)[rank]

    def noise(self, x):
        """N(0, I) in the shape of x (B, ...)."""
        return self.each(torch.randn, *x.shape).to(x)

    def times(self, first, last, count):
        """t (count,), uniform in first .. last."""
        return self.each(torch.randint, count, low=first, high=last + 1)


def vae_stage(vae, cfg):
    """mean (x - D(z))^2 + cfg.vae_kl * KL( q(z | x) || N(0, I) ), on small crops.

    KL = 1/2 sum (mean^2 + exp(logvar) - 1 - logvar), a sum over the latent.  A quarter
    of the crops is LQ, which the VAE has to pass as well (not in the paper).
    """
    def step(batch, draws):
        top, left = (draws.dice.randrange(cfg.crop - cfg.vae_crop + 1) for _ in "yx")
        low = (draws.each(torch.rand, len(batch.hq)) < 0.25).to(batch.hq.device)
        x = torch.where(low.view(-1, 1, 1, 1), batch.lq_up, batch.hq)
        x = x[:, :, top:top + cfg.vae_crop, left:left + cfg.vae_crop]
        mean, logvar = vae.posterior(x)
        z = mean + (logvar / 2).exp() * draws.noise(mean)
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        error = F.mse_loss(vae.decode(z * vae.scale), x)
        yield vae, {"mse": error, "kl": cfg.vae_kl * kl}
    return step, {vae: cfg.vae_learning_rate}


def prior_stage(prior, cfg):
    """E_t mean (f(x_t, y0, t) - x0)^2, t uniform, on the latents z_hq and z_lq.

    The KL weights are left out, as the paper does.  A share cfg.negative of samples
    has the negative prompt and the target y0 (S3Diff's trick; not in ResShift): that
    is what the negative prompt means in the chapters to come.
    """
    def step(batch, draws):
        y0 = batch.z_lq
        t = draws.times(1, cfg.steps, len(y0))
        prompt, x0 = negatives(batch.z_hq, y0, draws, cfg)
        x_t = prior.chain.q_sample(x0, y0, t, draws.noise(x0))
        yield prior, {"mse": F.mse_loss(prior(x_t, y0, t, prompt), x0)}
    return step, {prior: cfg.learning_rate}


def negatives(target, lq, draws, cfg):
    """S3Diff's online negatives: with probability cfg.negative the target is the LQ.

    Returns (prompt (B,), target): where the prompt is NEGATIVE the target is `lq`.
    """
    prompt = (draws.each(torch.rand, len(target)) < cfg.negative).long().to(lq.device)
    return prompt, torch.where((prompt == NEGATIVE).view(-1, 1, 1, 1), lq, target)


# ---- 7. One training loop for every stage (read) -------------------------------------
def train(run, name, stage, pairs, steps, watch=None):
    """Play a stage for `steps` steps; leave averaged weights in its first player.

    The random numbers of a step come from (seed, name, step), so that a resumed run
    repeats an uninterrupted one; on the CPU bit for bit.  A checkpoint
    runs/NAME/name.ckpt is renamed into place every cfg.save_every steps.  `watch()`
    returns figures to log beside the losses; it touches no global generator.
    """
    cfg, (step, rates), seen, started = run.cfg, stage, {}, time.time()
    # Adam is the papers' AdamW without decay; its betas are not in the papers.
    players = {player: torch.optim.Adam(
        [p for p in player.parameters() if p.requires_grad], rate, betas=(0.9, 0.99))
        for player, rate in rates.items()}
    trained = [o.param_groups[0]["params"] for o in players.values()]
    average = [p.detach().clone() for p in trained[0]]
    first = resume(run, name, players.values(), [average, *trained])
    bar = tqdm(range(first, steps), name, steps, initial=first, disable=quiet())
    for i, batch in zip(bar, pairs.batches(name, first, steps)):
        moves, done = step(batch, Draws(stage_seed(cfg, name, i))), i + 1
        warm = min(1.0, done / max(1, cfg.warmup))             # times half a cosine
        factor = warm * 0.5 * (1 + math.cos(math.pi * i / steps))
        while True:
            with autocast(cfg):
                player, losses = next(moves, (None, None))
            if player is None:
                break
            descend(players[player], losses, factor * rates[player], cfg.clip, name)
            seen |= {k: seen.get(k, []) + [v.detach()] for k, v in losses.items()}
        decay = min(cfg.ema, (1 + done) / (10 + done))         # rises at first
        torch._foreach_lerp_(average, [p.detach() for p in trained[0]], 1 - decay)
        if done % cfg.log_every == 0 or done == steps:
            values = {k: torch.stack(v).mean().item() for k, v in seen.items()}
            swap(trained[0], average)
            values |= watch() if watch and rank_and_size()[0] == 0 else {}
            swap(trained[0], average)
            each, seen = (time.time() - started) / (done - first), {}
            run.log(name, done, values)
            text = "  ".join(f"{k} {v:8.4f}" for k, v in values.items())
            tqdm.write(f"{name:9s} {done:6d}/{steps}  {text}  {1000 * each:5.0f} ms  "
                       f"{each * (steps - done):5.0f} s left")
        if done % cfg.save_every == 0 and done < steps:
            state = {"step": done, "tensors": [average, *trained],
                     "players": [o.state_dict() for o in players.values()]}
            torch.save(state, buffer := io.BytesIO())
            write_file(run.folder / f"{name}.ckpt", buffer.getvalue())
    swap(trained[0], average)


def descend(optimizer, losses, rate, clip, name):
    """One gradient step of the parameters in `optimizer`, and of nothing else.

    torch.autograd.grad leaves no gradient anywhere: no other network has to be frozen.
    Under torchrun the gradient is the mean over the processes.
    """
    parameters = optimizer.param_groups[0]["params"]
    gradients = torch.autograd.grad(sum(losses.values()), parameters, allow_unused=True)
    for p, gradient in zip(parameters, gradients):
        p.grad = gradient                                      # until the step is made
        if p.grad is not None and rank_and_size()[1] > 1:
            p.grad = p.grad.contiguous()
            torch.distributed.all_reduce(p.grad)
            p.grad /= rank_and_size()[1]
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    if not torch.isfinite(norm):                               # one sync a step
        bad = ", ".join(k for k, v in losses.items() if not torch.isfinite(v))
        raise FloatingPointError(f"{name}: not finite: {bad or 'the gradient'}")
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def swap(parameters, average):
    """Exchange the parameters with their average, in place; twice is the identity."""
    for p, a in zip(parameters, average):
        kept = p.clone()
        p.copy_(a)
        a.copy_(kept)


@torch.no_grad()
def resume(run, name, optimizers, tensors):
    """Go on from a stage's checkpoint; the next step's number, 0 without a file."""
    file = run.folder / f"{name}.ckpt"
    if not file.exists():
        return 0
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        for optimizer, moments in zip(optimizers, state["players"]):
            optimizer.load_state_dict(moments)
        for ours, saved in zip(tensors, state["tensors"]):
            torch._foreach_copy_(ours, saved)
    except Exception as error:                                 # truncated, foreign
        raise UserError(f"{file}: not a checkpoint of this stage; remove it to start "
                        f"the stage anew ({str(error).splitlines()[0]})") from None
    print(f"{name}: resuming at step {state['step']}")
    return state["step"]


def stage_seed(cfg, name, step):
    """A seed of its own for every run seed, stage and step."""
    return zlib.crc32(f"{cfg.seed} {name} {step}".encode())


# ---- 8. Chapter 1, from photographs to a prior (read) --------------------------------
def chapter(run, name, build, teach=None, before=()):
    """build()'s model with its weights: loaded if runs/NAME has them, else taught now.

    The global generator is seeded for each chapter, so that a chapter's start does not
    depend on which chapters before it were trained or loaded.  What a model shares with
    those in `before` is not stored again.  Without `teach` the file must exist.
    """
    torch.manual_seed(stage_seed(run.cfg, name, 0))
    model, file = build().to(device()), run.folder / f"{name}.safetensors"
    theirs = {v.data_ptr() for m in before for v in m.state_dict().values()}
    own = {k: v for k, v in model.state_dict().items() if v.data_ptr() not in theirs}
    if file.exists() or teach is None:
        load_weights(own, file)
        print(f"{name}: loaded")
    else:
        teach(model)
        save_weights(own, file)
        if rank_and_size()[0] == 0:
            (run.folder / f"{name}.ckpt").unlink(missing_ok=True)
    return model.requires_grad_(False).eval()


def chapter_end(run, pairs=None):
    """The end of cfg.space: `PixelShuffle`, or a VAE: loaded, or trained on `pairs`,
    or from cfg.vae_weights.  In the end `scale` makes HQ latents' variance 1."""
    cfg = run.cfg

    def teach(vae):
        if cfg.vae_weights:
            load_weights(vae.state_dict(), cfg.vae_weights, skip=("scale",))
        else:
            if cfg.vae_skip:
                batch = pairs.some(1024)                       # blur has to pass, too
                vae.start_linear(torch.cat([batch.hq, batch.lq_up]))
            train(run, "vae", vae_stage(vae, cfg), pairs, cfg.vae_steps)
        with torch.no_grad():
            vae.scale.copy_(vae.encode(pairs.some(64).hq).std().reciprocal())
    end = PixelShuffle(8) if cfg.space == "pixel" else chapter(
        run, "vae", lambda: VAE(cfg), pairs and teach)
    if pairs:
        pairs.add("z_hq", lambda batch: end.encode(batch.hq))
        pairs.add("z_lq", lambda batch: end.encode(batch.lq_up))
    return end


def chapter_prior(run, pairs=None):
    """The prior: loaded, or trained on `pairs`, from cfg.unet_weights if there are any.

    conv_in and conv_out stay at our start: Stable Diffusion has other channels.
    """
    cfg = run.cfg

    def teach(prior):
        if cfg.unet_weights:
            load_weights(prior.unet.state_dict(), cfg.unet_weights,
                         skip=("conv_in.", "conv_out."))
        train(run, "resshift", prior_stage(prior, cfg), pairs, cfg.prior_steps)
    return chapter(run, "resshift", lambda: ResShift(cfg), pairs and teach)


@torch.no_grad()
def error_by_time(prior, end, held):
    """Mean squared error of the latent x0 at t = 1 .. T, on held-out pairs."""
    errors, chain = torch.zeros(prior.chain.steps), prior.chain
    for p in held:
        x0 = end.encode(pad_to(p.hq, end.factor))
        y0 = end.encode(pad_to(upsample(p.lq, p.scale), end.factor))
        noise = noise_like(x0, torch.Generator().manual_seed(0))
        for t in torch.arange(1, chain.steps + 1).split(1):
            guess = prior(chain.q_sample(x0, y0, t, noise), y0, t)
            errors[t - 1] += F.mse_loss(guess, x0).cpu() / len(held)
    return errors.tolist()


@torch.no_grad()
def sample(prior, end, lq, scale=4, seed=0):
    """The whole chain: lq (1, 3, h, w) -> (1, 3, s h, s w) in [-1, 1], T steps."""
    x = upsample(lq, scale)
    y0 = end.encode(pad_to(x, end.factor))
    z = prior.chain.sample(prior, y0, torch.Generator().manual_seed(seed))
    return end.decode(z)[:, :, :x.shape[2], :x.shape[3]].clamp(-1, 1)


def pad_to(x, multiple):
    """x with its right and bottom edge repeated up to a multiple: (B, C, H', W')."""
    h, w = (-n % multiple for n in x.shape[2:])
    return F.pad(x, (0, w, 0, h), mode="replicate")


# ---- 9. The degradation (skim) -- Real-ESRGAN's two stages, S3Diff's mild ranges -----
RANGES = {                               # (first stage, second stage), but for shape
    "real-esrgan": SimpleNamespace(
        sigma=((0.2, 3.0), (0.2, 1.5)),          # of the blur, pixels
        shape=((0.5, 4.0), (1.0, 2.0)),          # its exponents: generalised, plateau
        resize=((0.15, 1.5), (0.3, 1.2)),        # factors, relative to HQ and to LQ
        gaussian=((1, 30), (1, 25)),             # sigma of the noise, / 255
        poisson=((0.05, 3.0), (0.05, 2.5)),      # scale of shot noise
        jpeg=((30, 95), (30, 95)), second_blur=0.8,
        sinc=1 / 3),                             # the last filter's least cutoff, / pi
    "mild": SimpleNamespace(
        sigma=((0.2, 1.5), (0.2, 1.0)), shape=((0.5, 2.0), (1.0, 1.5)),
        resize=((0.3, 1.5), (0.6, 1.2)), gaussian=((1, 15), (1, 12)),
        poisson=((0.05, 2.0), (0.05, 1.0)), jpeg=((60, 95), (60, 100)),
        second_blur=0.5, sinc=1 / 3),
    "light": SimpleNamespace(            # ours, for tiny: leaves letters to read
        sigma=((0.2, 0.8), (0.2, 0.5)), shape=((0.5, 2.0), (1.0, 1.5)),
        resize=((0.6, 1.2), (0.9, 1.1)), gaussian=((1, 8), (1, 5)),
        poisson=((0.05, 0.8), (0.05, 0.4)), jpeg=((75, 95), (85, 100)),
        second_blur=0.3, sinc=0.7)}
KERNELS = {"iso": 0.45, "aniso": 0.25, "generalised iso": 0.12,
           "generalised aniso": 0.03, "plateau iso": 0.12, "plateau aniso": 0.03}
RESIZE = ((0.2, 0.7, 0.1), (0.3, 0.4, 0.3))       # up, down, keep in the two stages
SINC_BLUR, SINC_FINAL = 0.1, 0.8                  # probabilities of a sinc filter
GAUSSIAN_NOISE, GRAY_NOISE = 0.5, 0.4             # else Poisson; else per channel
BLUR_MAX, NOISE_MAX = 1.2, 16 / 255               # score 1: LQ pixels; LQ RMS on [0, 1]


def gaussian_kernel(size, sigma_x, sigma_y=None, theta=0.0, shape=1.0, plateau=False):
    """exp(-u^s / 2) or 1 / (1 + u^s), u = x^T Sigma^-1 x, normalised: (size, size)."""
    n = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(n, n, indexing="ij")
    a = (x * math.cos(theta) + y * math.sin(theta)) / sigma_x
    b = (-x * math.sin(theta) + y * math.cos(theta)) / (sigma_y or sigma_x)
    u = (a ** 2 + b ** 2) ** shape
    k = 1 / (1 + u) if plateau else torch.exp(-0.5 * u)
    return (k / k.sum()).float()


def sinc_kernel(size, cutoff):
    """The circular low-pass c J1(c r) / (2 pi r), c in (0, pi], summing to 1, and the
    variance of the Gaussian whose response at c is one half, pixels^2."""
    n = torch.arange(size, dtype=torch.float64) - size // 2
    r = (n[:, None] ** 2 + n ** 2).sqrt().clamp(min=1e-6)
    k = cutoff * torch.special.bessel_j1(cutoff * r) / (2 * math.pi * r)
    return (k / k.sum()).float(), 2 * math.log(2) / cutoff ** 2


def random_kernel(dice, stage, ranges):
    """A blur kernel of Real-ESRGAN's mixture and its variance per axis, pixels^2."""
    size = 2 * dice.randrange(3, 11) + 1                       # odd, 7 .. 21
    if dice.random() < SINC_BLUR:
        least = math.pi / 3 if size < 13 else math.pi / 5
        return sinc_kernel(size, dice.uniform(least, math.pi))
    kind = dice.choices(list(KERNELS), KERNELS.values())[0]
    plateau, sigma = "plateau" in kind, [dice.uniform(*ranges.sigma[stage])]
    sigma += [dice.uniform(*ranges.sigma[stage]) if "aniso" in kind else None]
    shape = 1.0 if kind in ("iso", "aniso") else dice.uniform(*ranges.shape[plateau])
    k = gaussian_kernel(size, *sigma, dice.uniform(-math.pi, math.pi), shape, plateau)
    r2 = (torch.arange(size) - size // 2.0) ** 2
    return k, (k * (r2[:, None] + r2)).sum().item() / 2


def blur(x, kernel):
    """Filter every channel of x (B, C, H, W) by kernel (k, k), reflecting borders."""
    p, c = kernel.shape[0] // 2, x.shape[1]
    x = F.pad(x, (p, p, p, p), "reflect" if p < min(x.shape[2:]) else "replicate")
    return F.conv2d(x, kernel.to(x).expand(c, 1, -1, -1), groups=c)


def random_noise(x, dice, rng, stage, ranges):
    """x (1, 3, h, w) on [0, 1] plus Gaussian or Poisson noise, coloured or grey."""
    base = (luma(x) if dice.random() < GRAY_NOISE else x).clamp(0, 1)
    if dice.random() < GAUSSIAN_NOISE:
        sigma = dice.uniform(*ranges.gaussian[stage]) / 255
        return x + sigma * torch.randn(base.shape, generator=rng)
    shot = torch.poisson(base * 256, generator=rng) / 256 - base    # 256 photon levels
    return x + dice.uniform(*ranges.poisson[stage]) * shot


def jpeg(x, quality):
    """x (1, 3, h, w) on [0, 1] through Pillow's JPEG codec."""
    to_pil(x * 2 - 1).save(buffer := io.BytesIO(), "JPEG", quality=int(quality))
    return to_unit(from_pil(Image.open(buffer)))


def degrade_one(hq, cfg, dice, rng):
    """One picture (1, 3, H, W) in [0, 1] -> LQ (1, 3, H/s, W/s), [blur, noise].

    `clean` takes the same blurs and resizes as x, but no noise and no JPEG: their
    difference at the end is the true noise.  variance: the blur's, in LQ pixels^2.
    """
    ranges, small = RANGES[cfg.ranges], [n // cfg.scale for n in hq.shape[2:]]
    x, clean, variance = hq, hq, 0.0

    def both(function, *how):
        return function(torch.cat([x, clean]), *how).chunk(2)

    def resize(x, size):
        return F.interpolate(x, size, mode=dice.choice(["area", "bilinear", "bicubic"]))
    for stage in (0, 1):
        pixel = x.shape[2] / small[0]                          # LQ pixel, in x's pixels
        if stage == 0 or dice.random() < ranges.second_blur:
            kernel, v = random_kernel(dice, stage, ranges)
            (x, clean), variance = both(blur, kernel), variance + v / pixel ** 2
        low, high = ranges.resize[stage]
        ends = dice.choices([(1, high), (low, 1), (1, 1)], RESIZE[stage])[0]
        base, factor = small if stage else hq.shape[2:], dice.uniform(*ends)
        x, clean = both(resize, [max(1, int(n * factor)) for n in base])
        if x.shape[2] < small[0]:        # what lies above f pi is lost, as in a sinc
            variance += 2 * math.log(2) / math.pi ** 2 * (
                (small[0] / x.shape[2]) ** 2 - 1)
        x = random_noise(x, dice, rng, stage, ranges).clamp(0, 1)
        if stage == 0:
            x = jpeg(x, dice.uniform(*ranges.jpeg[0]))
    sinc_first, quality = dice.random() < 0.5, dice.uniform(*ranges.jpeg[1])
    x = x if sinc_first else jpeg(x, quality)
    x, clean = both(resize, small)
    if dice.random() < SINC_FINAL:
        kernel, v = sinc_kernel(21, math.pi * dice.uniform(ranges.sinc, 1))
        (x, clean), variance = both(blur, kernel), variance + v
    x, clean = x.clamp(0, 1), clean.clamp(0, 1)
    x = jpeg(x, quality) if sinc_first else x
    noise = (x - clean).square().mean().sqrt().item()
    return x, [min(1.0, variance ** 0.5 / BLUR_MAX), min(1.0, noise / NOISE_MAX)]


def degrade(hq, cfg, generator):
    """Real-ESRGAN's two stages: hq (B, 3, H, W) -> lq (B, 3, H/s, W/s), scores (B, 2).

    blur, resize, noise, JPEG; blur (p), resize, noise; then resize to H/s with a sinc
    filter, and JPEG before or after it.  lq is in [-1, 1] on 8-bit levels.  The scores
    are true strengths, not estimates (S3Diff learns them by ranking): blur, the width
    of all filters together (LQ pixels / BLUR_MAX), and noise, the RMS of what noise
    and JPEG left in lq (/ NOISE_MAX), both cut at 1.
    """
    seeds = torch.randint(2 ** 62, (len(hq),), generator=generator).tolist()
    lq, scores = zip(*(degrade_one(x, cfg, random.Random(seed), generator)
                       for x, seed in zip(to_unit(hq.cpu()).split(1), seeds)))
    return from_bytes((torch.cat(lq) * 255).round()), torch.tensor(scores)


# ---- 10. Pictures and metrics (skim) -------------------------------------------------
class UserError(Exception):
    """What the user can mend: one line on stderr, exit code 2."""


def to_unit(x):
    """[-1, 1] -> [0, 1], clamped."""
    return (x.clamp(-1, 1) + 1) / 2


def to_bytes(x):
    """[-1, 1] -> uint8, rounded."""
    return (to_unit(x) * 255).round().to(torch.uint8)


def from_bytes(x):
    """0 .. 255 -> float in [-1, 1]."""
    return x.float() / 127.5 - 1


def to_pil(x):
    """(1, 3, H, W) in [-1, 1] -> a Pillow picture."""
    return Image.fromarray(rearrange(to_bytes(x[0]), "c h w -> h w c").cpu().numpy())


def from_pil(picture):
    """A Pillow picture -> (1, 3, H, W) in [-1, 1]; alpha is dropped."""
    array = torch.from_numpy(np.array(picture.convert("RGB")))
    return from_bytes(rearrange(array, "h w c -> 1 c h w"))


def open_picture(path):
    """The file as a viewer would show it: a Pillow picture in RGB or RGBA, with its
    ICC profile in `info` if that is one of RGB."""
    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)
            profile = picture.info.get("icc_profile") or b""
            if picture.mode.startswith("I") or picture.mode == "F":
                array = np.array(picture, dtype=np.float64)    # 16 bits and more
                deep = picture.mode.startswith("I;16") or array.max() > 255
                unit = picture.mode == "F" and array.max() <= 1
                array = array / 257 if deep else array * 255 if unit else array
                picture = Image.fromarray(array.clip(0, 255).round().astype(np.uint8))
            alpha = "A" in picture.getbands() or "transparency" in picture.info
            picture = picture.convert("RGBA" if alpha else "RGB")
            picture.info = {"icc_profile": profile} if profile[16:20] == b"RGB " else {}
            return picture
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable picture ({error})") from None


def picture_files(folder):
    """The pictures in a folder and below it, sorted; UserError where there are none."""
    kinds = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in kinds)
    if not files:
        raise UserError(f"{folder}: no pictures in this folder")
    return files


def upsample(lq, scale):
    """Bicubic (a = -0.5, as Pillow and Matlab have it): (B, 3, h, w) -> s times."""
    size = [round(n * scale) for n in lq.shape[2:]]
    return F.interpolate(lq, size, mode="bicubic", antialias=True).clamp(-1, 1)


def luma(x):
    """Full-range BT.601 luma of RGB: (B, 3, H, W) -> (B, 1, H, W)."""
    weights = x.new_tensor((0.299, 0.587, 0.114)).view(3, 1, 1)
    return (x * weights).sum(1, keepdim=True)


def studio_y(x):
    """Y of BT.601 in 16 .. 235, from [0, 1] RGB, unrounded: (B, 1, H, W), float64."""
    return 219 * luma(x.double()) + 16


def psnr(a, b):
    """10 log10(255^2 / MSE) on unrounded Y, no border crop: (B,) dB from [0, 1]."""
    mse = (studio_y(a) - studio_y(b)).square().mean((1, 2, 3))
    return 10 * torch.log10(255 ** 2 / mse)


def ssim(a, b):
    """SSIM on 8-bit Y, 11x11 Gaussian of 1.5, valid region: (B,), from [0, 1].

    ((2 mu_a mu_b + C1) / (mu_a^2 + mu_b^2 + C1)) ((2 cov + C2) / (var_a + var_b + C2)),
    Wang et al. 2004, with negative contrast terms clamped at 0.
    """
    a, b = studio_y(a).round(), studio_y(b).round()
    window, c1, c2 = gaussian_kernel(11, 1.5).to(a)[None, None], 2.55 ** 2, 7.65 ** 2
    mu_a, mu_b, aa, bb, ab = (F.conv2d(x, window) for x in (a, b, a * a, b * b, a * b))
    contrast = (2 * (ab - mu_a * mu_b) + c2) / (aa - mu_a ** 2 + bb - mu_b ** 2 + c2)
    luminance = (2 * mu_a * mu_b + c1) / (mu_a ** 2 + mu_b ** 2 + c1)
    return (luminance * contrast.clamp(min=0)).mean((1, 2, 3))


def spectrum(y, bands=31):
    """Mean of 10 log10 P over 31 rings of radial frequency up to 1/2: (B, 31) dB.

    P: power of the luma in grey levels^2, Hann window, mean removed; y in [-1, 1].  The
    mean of the log, so that a few spikes do not pass for detail; P below 1e-3 counts
    as 1e-3.  Ours, as are the two measures below.
    """
    grey = 255 * luma(to_unit(y).double())[:, 0]
    rows, columns = (torch.hann_window(n, dtype=grey.dtype, device=y.device) for n in
                     grey.shape[1:])
    window = rows[:, None] * columns
    grey = (grey - grey.mean((1, 2), keepdim=True)) * window
    power = torch.fft.fft2(grey).abs().square() / window.square().sum()
    v, u = (torch.fft.fftfreq(n, device=y.device) for n in grey.shape[1:])
    ring = ((v[:, None] ** 2 + u ** 2).sqrt() * 2 * bands).long()
    level = 10 * torch.log10(power.clamp(min=1e-3))
    return torch.stack([level[:, ring == k].mean(1) for k in range(bands)], dim=1)


def spectral_distance(y, hq):
    """Mean |difference| of two pictures' `spectrum`: (B,) dB; blur and noise raise it.

    Read it beside LPIPS and the lattice peak: noise and grids are "detail" to it.
    """
    return (spectrum(y) - spectrum(hq)).abs().mean(1)


def lattice_points(y):
    """(power, near): at the 64 points (k/8, l/8), (B, 64), and in their surroundings.

    near: the mean power of a point's 7x7 neighbourhood without the inner 3x3.  Unitary
    fft2 of the luma on 8-bit levels, mean removed; y (B, 3, H, W) in [-1, 1]; what is
    over a multiple of 8 is left out.
    """
    grey = luma(to_bytes(y[:, :, :y.shape[2] // 8 * 8, :y.shape[3] // 8 * 8]).double())
    grey = grey - grey.mean((2, 3), keepdim=True)
    power = torch.fft.fft2(grey, norm="ortho").abs() ** 2
    ring = torch.ones(1, 1, 7, 7).to(power)
    ring[:, :, 2:5, 2:5] = 0
    near = F.conv2d(F.pad(power, (3, 3, 3, 3), "circular"), ring) / ring.sum()
    h, w = (n // 8 for n in grey.shape[2:])
    return [x[:, 0, ::h, ::w].flatten(1).clamp(min=1e-9) for x in (power, near)]


def lattice_peak(y):
    """A repeated 8x8 pattern: the mean over the points but (0, 0) of 10 log10(power /
    near): (B,) dB.  Chance gives -2.5."""
    power, near = lattice_points(y)
    return 10 * torch.log10(power / near)[:, 1:].mean(1)


def lattice_amplitude(y):
    """The RMS of what stands above the surroundings there: (B,) grey levels of 255."""
    power, near = (x[:, 1:] for x in lattice_points(y))
    pixels = (y.shape[2] // 8 * 8) * (y.shape[3] // 8 * 8)
    return ((power - near).clamp(min=0).sum(1) / pixels).sqrt()


class Perceptual(nn.Module):
    """LPIPS of images in [-1, 1]: forward(a, b) -> (B,).  `name` says what measured.

    torchvision downloads the backbone on first use.  Where it cannot, it stays at a
    fixed random seed, and every table of it says "LPIPS (random features)".  A file
    that is there already must have the SHA-256 that its name begins: it is unpickled.
    """
    FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}

    def __init__(self, net):
        super().__init__()
        import lpips                     # slow: not for --help, not for a picture
        file = Path(torch.hub.get_dir(), "checkpoints", self.FILES[net])
        if file.exists():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            if not file.stem.endswith(digest[:8]):
                raise UserError(f"{file}: not torchvision's: its SHA-256 is {digest}")
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")                    # torchvision's old API
            torch.manual_seed(0)
            try:
                self.model = lpips.LPIPS(net=net, verbose=False)
                self.name = f"LPIPS ({net})"
            except OSError:                                    # URLError is one
                print("LPIPS: no backbone; random features instead. For the real one "
                      f"put {file.name} (torchvision) into {file.parent}")
                self.model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
                self.name = "LPIPS (random features)"
        self.requires_grad_(False).eval()

    def forward(self, a, b):
        return self.model(a, b).flatten()


@torch.no_grad()
def evaluate(methods, held, lpips):
    """{method: {**means, "ms", "each": [{"psnr", "ssim", ...}], "pictures": [...]}}.

    methods: {name: function of a held-out pair -> (1, 3, H, W) in [-1, 1]}.
    """
    table = {}
    for name, method in methods.items():
        method(held[0])                                        # a warm-up
        started, each = time.perf_counter(), []
        pictures = [method(pair).float().clamp(-1, 1) for pair in held]
        if device().type == "cuda":
            torch.cuda.synchronize()
        ms = 1000 * (time.perf_counter() - started) / len(held)
        for y, pair in zip(pictures, held):
            a, b = to_unit(y), to_unit(pair.hq)
            each.append({"psnr": psnr(a, b).item(), "ssim": ssim(a, b).item(),
                         "lpips": lpips(y, pair.hq).item(),
                         "spectral": spectral_distance(y, pair.hq).item(),
                         "lattice": lattice_peak(y).item(),
                         "lattice_amplitude": lattice_amplitude(y).item()})
        table[name] = {**means(each), "ms": ms, "each": each, "pictures": pictures}
    return table


def means(each):
    """{key: mean} of a list of rows with the same keys."""
    return {k: sum(e[k] for e in each) / len(each) for k in each[0]}


def print_table(title, rows, columns):
    """Print, and return, a Markdown table: rows {name: {key: value}}, columns {key:
    (head, format)}; a value is a number or a text; what a row lacks stays empty."""
    table = [[title, *(head for head, _ in columns.values())]] + [
        [name, *(v if isinstance(v := row.get(k, ""), str) else format(v, form)
                 for k, (_, form) in columns.items())] for name, row in rows.items()]
    wide = [max(map(len, column)) for column in zip(*table)]
    text = ["| " + " | ".join(f"{cell:{'>' if i else ''}{n}s}" for i, (cell, n) in
                              enumerate(zip(line, wide))) + " |" for line in table]
    text[1:1] = [f"|{'-' * wide[0]}--|" + "".join(f"{'-' * n}-:|" for n in wide[1:])]
    text = "\n".join(text) + "\n"
    print("\n" + text, end="")
    return text


QUALITY = {"psnr": ("PSNR", ".2f"), "ssim": ("SSIM", ".4f"), "lpips": ("LPIPS", ".4f"),
           "spectral": ("spectral dB", ".1f"), "lattice": ("lattice dB", ".1f"),
           "lattice_amplitude": ("grey", ".2f"), "ms": ("ms", ".0f")}


def spread(found, columns):
    """{key: "mean +- deviation"} of rows that differ in their seed: `print_table`'s."""
    v = {k: torch.tensor([float(row[k]) for row in found]) for k in columns if
         k in found[0]}
    return {k: f"never in {(~x.isfinite()).sum()}" if not x.isfinite().all() else
            f"{x.mean():{columns[k][1]}}" + (
                f" +- {x.std():{columns[k][1]}}" if len(found) > 1 else "")
            for k, x in v.items()}


# ---- 11. Training pairs (skim) -------------------------------------------------------
class Pairs(Dataset):
    """Degraded pairs from a folder of photographs; item `seed` is that seed's pair.

    With cfg.pool a number of pairs is made once and kept, and so are frozen networks'
    outputs on them (`add`); with pool = 0 every step has new pairs, from torch's
    DataLoader, photographs are read when needed, and networks run on each batch.
    """

    def __init__(self, cfg):
        self.cfg, self.kept, files = cfg, {}, picture_files(cfg.train_data)
        self.teachers = {"lq_up": lambda batch: upsample(batch.lq, cfg.scale)}
        self.files = [f for f in files if min(Image.open(f).size) >= cfg.crop]
        print(f"{cfg.train_data}: {len(self.files)} photographs used, "
              f"{len(files) - len(self.files)} left out, smaller than {cfg.crop} px")
        if not self.files:
            raise UserError(f"{cfg.train_data}: no picture has a {cfg.crop} pixel crop")

    def __getstate__(self):              # for workers: without networks and pool
        return {"cfg": self.cfg, "files": self.files}

    def __getitem__(self, seed):
        rng, dice = torch.Generator().manual_seed(seed), random.Random(seed)
        photo = from_pil(open_picture(dice.choice(self.files)))
        hq = random_crop(photo, self.cfg.crop, dice)
        lq, scores = degrade(hq, self.cfg, rng)
        return {"hq": to_bytes(hq)[0], "lq": to_bytes(lq)[0], "scores": scores[0]}

    def make(self, seeds, size):
        """Batches of `size` pairs for these seeds, from cfg.workers processes."""
        return DataLoader(self, size, sampler=seeds, num_workers=self.cfg.workers,
                          pin_memory=device().type == "cuda")

    def fill(self):
        """Make the pool, if cfg asks for one."""
        seeds = [stage_seed(self.cfg, "pool", i) for i in range(self.cfg.pool)]
        made = list(tqdm(self.make(seeds, 1), "pairs", disable=quiet()))
        self.kept = {k: torch.cat([m[k] for m in made]) for k in (made or [{}])[0]}

    def batch(self, columns, index=slice(None)):
        """The `Batch` of these columns' rows on the device, pictures as float."""
        rows = {k: v[index].to(device(), non_blocking=True) for k, v in columns.items()}
        return Batch(teachers=self.teachers, **{
            k: from_bytes(v) if v.dtype == torch.uint8 else v for k, v in rows.items()})

    def some(self, count):
        """A `Batch` of the first `count` pairs, or fewer where crops are over 128^2."""
        count = max(1, min(count, count * 128 ** 2 // self.cfg.crop ** 2))
        seeds = [stage_seed(self.cfg, "pool", i) for i in range(count)]
        return self.batch(self.kept or next(iter(self.make(seeds, count))),
                          slice(count))

    def batches(self, stage, first, steps):
        """The batches of steps first .. steps - 1, other samples in every process."""
        cfg, (rank, size) = self.cfg, rank_and_size()
        n = cfg.estimator_batch if stage == "estimator" else cfg.batch
        if self.kept:
            for i in range(first, steps):
                draws = Draws(stage_seed(cfg, f"{stage} rows", i))
                yield self.batch(self.kept, draws.each(torch.randint, n, high=cfg.pool))
        else:
            seeds = (stage_seed(cfg, f"{stage} pairs", (i * size + rank) * n + j)
                     for i in range(first, steps) for j in range(n))
            yield from map(self.batch, self.make(seeds, n))

    def add(self, name, function, keep=True):
        """Let function(batch) fill the field `name`: when it is read, or (keep) now and
        for the whole pool, where there is one: worth it for what is read often."""
        self.teachers[name], n = function, self.cfg.batch
        self.kept.pop(name, None)                              # an older one
        if self.kept and keep:
            self.kept[name] = torch.cat([
                getattr(self.batch(self.kept, slice(i, i + n)), name).cpu() for i in
                tqdm(range(0, self.cfg.pool, n), name, disable=quiet())])


def random_crop(photo, size, dice):
    """A size x size crop of photo (1, 3, H, W): shrunk, mirrored, recoloured.

    Half of the crops come from a photo scaled down by 1 .. 0.7, half get their colour
    channels permuted: few photographs must teach many.
    """
    if dice.random() < 0.5:
        factor = dice.uniform(max(0.7, size / min(photo.shape[2:])), 1)
        shape = [max(size, round(n * factor)) for n in photo.shape[2:]]
        photo = F.interpolate(photo, shape, mode="bicubic", antialias=True)
    top, left = (dice.randrange(n - size + 1) for n in photo.shape[2:])
    crop = photo[:, :, top:top + size, left:left + size]
    if dice.random() < 0.5:
        crop = crop[:, dice.sample(range(3), 3)]
    return (crop.flip(3) if dice.random() < 0.5 else crop).clamp(-1, 1)


def held_out(cfg, folder=None):
    """Held-out photos: (name, group, draw, hq, lq, scale); group: its folder's name.

    Each is degraded cfg.val_draws times (draw 0, 1, ..), with seeds of its own,
    whatever cfg.seed.  A folder with lq/ and hq/ inside gives real pairs, by name, of
    any scale in 1 .. 4.
    """
    folder, held, s = Path(folder or cfg.val_data), [], 8 * cfg.scale
    real = (folder / "lq").is_dir()
    roots = (folder / "hq", folder / "lq") if real else (folder, folder)
    found = [picture_files(root) for root in roots]
    files, other = ({str(f.relative_to(root).with_suffix("")): f for f in some}
                    for root, some in zip(roots, found))
    if len(files) + len(other) < sum(map(len, found)):
        raise UserError(f"{folder}: two pictures of one name")
    if files.keys() != other.keys():
        odd = ", ".join(sorted(files.keys() ^ other.keys()))
        raise UserError(f"{folder}: in lq/ or in hq/ alone: {odd}")
    for i, (name, file) in enumerate(files.items()):
        hq = from_pil(open_picture(file))
        if min(hq.shape[2:]) < s:
            raise UserError(f"{file}: smaller than {s} pixels")
        scale = cfg.scale
        if real:
            lq = from_pil(open_picture(other[name]))
            scale = hq.shape[2] / lq.shape[2]
            if hq.shape[3] != round(scale * lq.shape[3]) or not 1 <= scale <= 4:
                raise UserError(f"{file}: not 1 to 4 times as large as its LQ")
        hq = hq if real else hq[:, :, :hq.shape[2] // s * s, :hq.shape[3] // s * s]
        for draw in range(1 if real else cfg.val_draws):
            if not real:
                rng = torch.Generator().manual_seed(10_000 + 100 * i + draw)
                lq, _ = degrade(hq, cfg, rng)
            held.append(SimpleNamespace(
                name=name, group=file.parent.name, draw=draw, hq=hq.to(device()),
                lq=lq.to(device()), scale=scale))
    return held


# ---- 12. Devices, processes, files (skim) --------------------------------------------
def device():
    """The default device where one is set (meta, say), else the GPU, else the CPU."""
    default = torch.get_default_device()
    cuda = default.type == "cpu" and torch.cuda.is_available()
    return torch.device("cuda") if cuda else default


def autocast(cfg):
    """bf16 autocast on CUDA where the preset asks for it; plain fp32 otherwise."""
    on = cfg.precision == "bf16" and device().type == "cuda"
    return torch.autocast(device().type, dtype=torch.bfloat16, enabled=on)


def rank_and_size():
    """(rank of this process, number of processes): (0, 1) unless under torchrun."""
    d = torch.distributed
    joined = d.is_available() and d.is_initialized()
    return (d.get_rank(), d.get_world_size()) if joined else (0, 1)


def quiet():
    """tqdm's `disable`: no bars where stderr is no terminal, or from other ranks."""
    return True if rank_and_size()[0] > 0 else None


class Run:
    """A folder runs/NAME: its settings, log, weights; one process at a time writes it.

    Without a cfg it is a finished run, to be read.  on: {name: checksum} of what a part
    of a run stands on; like the settings it must not change while the run goes on.
    """
    FREE = {"save_every", "log_every", "workers"}              # may change on the way

    def __init__(self, folder, cfg=None, on=None):
        self.folder, self.cfg = Path(folder), cfg
        file, self.csv = self.folder / "config.json", self.folder / "log.csv"
        try:
            old = json.loads(file.read_text()) if file.exists() else {}
            old.keys()
        except (ValueError, AttributeError):
            raise UserError(f"{file}: not the settings of a run") from None
        if cfg is None:
            odd = (set(old) - {"on"}) ^ set(TABLE)
            if odd:
                raise UserError(f"{file}: another version's {', '.join(sorted(odd))}"
                                if old else f"{folder}: no run here; train first")
            self.cfg = Config(**{k: tuple(v) if isinstance(v, list) else v
                                 for k, v in old.items() if k != "on"})
        elif rank_and_size()[0] == 0:                          # rank 0 alone writes
            now = json.loads(json.dumps(dataclasses.asdict(cfg) | {"on": on or {}}))
            odd = {k for k in now | old if old and old.get(k) != now.get(k)} - self.FREE
            if odd:
                raise UserError(f"{folder}: trained with another {', '.join(odd)}; "
                                "choose another --run or remove it")
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock()
            write_file(file, json.dumps(now, indent=1))

    def lock(self):
        """Hold runs/NAME/lock until the process ends, however it ends (POSIX only)."""
        if importlib.util.find_spec("fcntl"):
            import fcntl
            self.lock_file = open(self.folder / "lock", "w")
            try:
                fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.folder}: another process writes it") from None

    def part(self, name, stands_on, **change):
        """A run in a folder of this one, with some numbers changed.

        stands_on: the chapters of this run whose weights it uses.  A stage's seed comes
        from its name and cfg.seed alone: the same stage in two parts starts alike.
        """
        on = {n: zlib.crc32((self.folder / f"{n}.safetensors").read_bytes())
              for n in stands_on}
        return Run(self.folder / name, dataclasses.replace(self.cfg, **change), on)

    def log(self, stage, step, values):
        """Append one row a value to log.csv: stage, step, name, value."""
        if rank_and_size()[0] == 0:
            head = "" if self.csv.exists() else "stage,step,name,value\n"
            with open(self.csv, "a") as f:
                f.write(head + "".join(f"{stage},{step},{k},{v:.6g}\n"
                                       for k, v in values.items()))

    def curves(self):
        """log.csv as {(stage, name): {step: value}}; a resumed stage repeats rows."""
        found = {}
        for row in csv.DictReader(self.csv.open()) if self.csv.exists() else ():
            steps = found.setdefault((row["stage"], row["name"]), {})
            steps[int(row["step"])] = float(row["value"])
        return found


def write_file(path, data):
    """Write text or bytes, or call data(path), to a temporary file, then rename it:
    whole or not at all; rank 0's."""
    if rank_and_size()[0] == 0:
        temporary = Path(f"{path}.tmp")
        try:
            if callable(data):
                data(temporary)
            else:
                temporary.write_bytes(data.encode() if isinstance(data, str) else data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def save_weights(state, path):
    """A state dict as .safetensors; tensors with two names are written twice."""
    write_file(path, safetensors.torch.save({
        k: v.detach().cpu().contiguous().clone() for k, v in state.items()}))


@torch.no_grad()
def load_weights(own, path, skip=()):
    """Copy a .safetensors file into `own` {name: tensor}, but for names that start
    with `skip`; UserError where there is no such file, or it does not fit."""
    try:
        state = safetensors.torch.load(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is the run trained?") from None
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a weights file ({error})") from None
    own, state = ({k: v for k, v in tensors.items() if not k.startswith(skip)}
                  for tensors in (own, state))
    for k in own | state:
        shapes = [tuple(s[k].shape) if k in s else "not there" for s in (own, state)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{path}: {k} is {shapes[1]}, the network's {shapes[0]}")
        if not state[k].isfinite().all():
            raise UserError(f"{path}: {k} is not finite")
        own[k].copy_(state[k])


# ---- 13. Command line (skim) ---------------------------------------------------------
CHOICES = {"ranges": tuple(RANGES), "space": ("latent", "pixel"),
           "adapter": ("guided", "plain", "full"), "precision": ("fp32", "bf16"),
           "distill": ("none", "vsd", "sid", "cid"), "lpips_net": ("alex", "vgg"),
           "critic": ("prior", "gendr", "adc"), "teacher": ("gendr", "hq")}


def command_of(doc, commands, flags):
    """(command, {flag: value}) of the command line; only flags given are in it.

    commands {name: (add_argument's keywords, flags that it reads)}, flags {name:
    keywords}; beside them --tiny, --full, --run and a flag for every number of `TABLE`.
    A flag that the command does not read is an error, never silence.
    """
    def refuse(message):                 # one line instead of argparse's many
        raise UserError(f"{message} (--help lists the flags)")

    def flag_of(name):
        return "--" + name.replace("_", "-")

    def number(text):
        if not math.isfinite(float(text)):
            raise argparse.ArgumentTypeError(f"not a finite number: {text}")
        return float(text)
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.error, size = refuse, parser.add_mutually_exclusive_group()
    for name, how in {"tiny": "a CPU, minutes", "full": "SD 2.1's size"}.items():
        size.add_argument(flag_of(name), action="store_true", help=f"preset: {how}")
    parser.add_argument("--run", help="folder of the run, runs/PRESET if left out")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU if left out")
    for title, names in (("what to do", {k: how for k, (how, _) in commands.items()}),
                         ("how", flags)):
        group = parser.add_argument_group(title)
        for name, how in names.items():
            how = how | {"type": number} if how.get("type") is float else how
            group.add_argument(flag_of(name), **how)
    numbers = parser.add_argument_group("numbers (preset < flag), with small's values")
    for name, value in vars(preset("small")).items():
        how = {bool: dict(action=argparse.BooleanOptionalAction), float: dict(
            type=number), tuple: dict(type=int, nargs="+")}.get(
                type(value), dict(type=type(value), choices=CHOICES.get(name)))
        numbers.add_argument(flag_of(name), help=str(value), **how)
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in
            vars(parser.parse_args()).items()}
    if not (command := next((c for c in commands if c in args), None)):
        refuse("nothing to do: " + ", ".join(map(flag_of, commands)))
    reads = commands[command][1]         # a preset gives numbers, or names the run
    free = {"device", *("seed" in reads or "run" not in args) * ("tiny", "full")}
    unused = set(args) - {command, *reads, *(free if reads else ())}
    if unused:
        refuse(f"--{command} does not use " + ", ".join(map(flag_of, sorted(unused))))
    os.environ |= {"CUDA_VISIBLE_DEVICES": ""} if args.get("device") == "cpu" else {}
    if args.get("device") == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: there is none")
    name = next((n for n in ("tiny", "full") if n in args), "small")
    return command, {"run": f"runs/{name}", "preset": name, **args}


def config_from(args):
    """The `Config` of a command line: preset < flag; refuses, before anything is
    written, what would fail in the middle of a run."""
    cfg = dataclasses.replace(preset(args["preset"]),
                              **{k: v for k, v in args.items() if k in TABLE})
    zero = {"pool", "workers", "vae_lora_rank", "seed", "mask_radius", "warmup"} | {
        k for k in TABLE if k.endswith("_steps")}
    rules = {f"{k} is {int(k not in zero)} or more": v >= (k not in zero) for k, v in
             vars(cfg).items() if type(v) is int} | {
        f"{k} is not negative": v >= 0 for k, v in vars(cfg).items() if
        type(v) is float} | {
        f"{k} is over 0": getattr(cfg, k) > 0 for k in ("kappa", "power", "clip", *(
            k for k in TABLE if k.endswith("learning_rate")))} | {
        "steps is 2 or more": cfg.steps >= 2, "ema is under 1": cfg.ema < 1,
        "negative is 1 at most": cfg.negative <= 1, "scale is 4 at most": cfg.scale < 5,
        "pad_phases is 8 at most": cfg.pad_phases <= 8,
        "0 <= eta_1 < eta_T < 1": 0 <= cfg.eta_1 < cfg.eta_T < 1,
        "vae_widths has four levels: f = 8": len(cfg.vae_widths) == 4,
        "unet_widths has two levels or more": len(cfg.unet_widths) >= 2,
        **{f"{k}widths are multiples of {n}": all(w > 0 and w % n == 0 for w in widths)
           for k, n, widths in (("unet_", max(cfg.groups, 1), cfg.unet_widths),
                                ("vae_", max(cfg.vae_groups, 1), cfg.vae_widths))},
        "unet_widths are multiples of head_width, or smaller": all(
            w < cfg.head_width or w % max(cfg.head_width, 1) == 0
            for w in cfg.unet_widths),
        f"crop is a multiple of {8 * cfg.scale}":
            cfg.crop % (8 * max(cfg.scale, 1)) == 0,
        "vae_crop is a multiple of 8, at most crop":
            cfg.vae_crop <= cfg.crop and cfg.vae_crop % 8 == 0,
        "repeated needs --no-least-squares": not (cfg.repeated and cfg.least_squares),
        "vae_weights need --no-vae-skip": not (cfg.vae_weights and cfg.vae_skip),
        **{f"{file}: no such file": not file or Path(file).is_file() for file in
           (cfg.unet_weights, cfg.vae_weights)}}
    for rule in (rule for rule, holds in rules.items() if not holds):
        raise UserError(rule)
    return cfg


def command_line(main):
    """Run main(); what the user can mend is one line on stderr and exit code 2.

    Under torchrun the processes meet first (NCCL, or gloo without a GPU): each trains
    on its share of each batch, rank 0 alone speaks and writes.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")          # names of any alphabet
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            cuda = torch.cuda.is_available()
            if cuda:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            torch.distributed.init_process_group("nccl" if cuda else "gloo")
            if rank_and_size()[0] > 0:
                sys.stdout = open(os.devnull, "w")
        code = main()
        if rank_and_size()[1] > 1:
            torch.distributed.destroy_process_group()
        sys.exit(code)
    except KeyboardInterrupt:
        print("interrupted: the same --train goes on from here", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError, FloatingPointError) as error:  # OSError: a full disk
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(
                text in str(error) for text in ("out of memory", "not enough memory")):
            raise
        print("error: not enough memory: try a smaller --tile, --batch or --crop",
              file=sys.stderr)
        sys.exit(2)


def main():
    """python resshift.py --exact: chapter 0; --train: train and evaluate chapter 1."""
    command, args = command_of(__doc__, {
        "train": (dict(action="store_true", help="train what is missing, evaluate"),
                  (*TABLE, "run")),
        "exact": (dict(action="store_true", help="chapter 0: a table, exact.png"), ())},
        {})
    if command == "exact":
        return exact()
    cfg = config_from(args)
    held, pairs, run = held_out(cfg), Pairs(cfg), Run(args["run"], cfg)
    lpips = Perceptual(cfg.lpips_net).to(device())
    pairs.fill()
    end, prior = chapter_end(run, pairs), chapter_prior(run, pairs)
    table = evaluate({"bicubic": lambda p: upsample(p.lq, p.scale),
                      "ResShift": lambda p: sample(prior, end, p.lq, p.scale)}, held,
                     lpips)
    print_table(f"held-out pictures; {lpips.name}", table, QUALITY)


if __name__ == "__main__":
    command_line(main)
