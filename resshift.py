"""ResShift: super-resolution by shifting the residual (chapter 1, complete in itself).

A restored photograph is the end of a short Markov chain that starts at the degraded
one.  This file holds the chain, its U-Net, the two kinds of ends (a VAE, or plain
pixel-unshuffle), the degradation that makes training pairs out of good photographs,
and one training loop.  `gendr_pix.py` (chapters 2 to 4) imports its names from here.

Papers: ResShift, arXiv 2307.12348 (NeurIPS 2023), journal version 2403.07319.
        Degradation: Real-ESRGAN, arXiv 2107.10833; mild ranges: S3Diff, 2409.17058.

    python resshift.py --train --tiny                   train on tiny_data/, evaluate
    python resshift.py --train --tiny --space pixel --run runs/pixel    no autoencoder
    python resshift.py --tiny --input lq.png            restore one picture to up.png
    python resshift.py --figure                         draw schedules and chain
    python resshift.py --compare --tiny                 noise, speed and T in one table

The first takes minutes on 2 CPU cores and ends in a table of bicubic and ResShift.

Symbols: B batch, C channels, H W full resolution, h w latent resolution, f = 8;
         x0 clean, y0 degraded (upsampled to x0's size), e0 = y0 - x0, t = 1 .. T.
Ranges:  images are float in [-1, 1] inside, [0, 1] in metrics, uint8 in files.
"""
import argparse
import copy
import csv
import dataclasses
import io
import json
import math
import os
import sys
import textwrap
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lpips
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ---- 1. Every number (read) --------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Every number of both scripts.  The defaults are the preset "small"."""
    # data
    train_data: str = "tiny_data/train"
    val_data: str = "tiny_data/val"
    scale: int = 4                       # LQ to HQ
    crop: int = 256                      # HQ training crop, pixels
    pool: int = 8192                     # degraded pairs made once, before training
    ranges: str = "mild"                 # of the degradation: a row of RANGES
    # the chain (ResShift)
    space: str = "latent"                # "latent": VAE; "pixel": pixel-unshuffle
    steps: int = 15                      # T
    kappa: float = 2.0                   # noise strength
    power: float = 0.3                   # p, the shifting speed
    eta_1: float = 0.0                   # 0: the paper's min((0.04 / kappa)^2, 0.001)
    eta_T: float = 0.999
    # the networks
    unet_widths: tuple = (128, 256, 384, 384)
    unet_blocks: int = 2                 # residual blocks a level
    head_width: int = 64                 # channels of one attention head
    groups: int = 32                     # GroupNorm, U-Net
    context_tokens: int = 77
    context_width: int = 256
    latent_channels: int = 16
    vae_widths: tuple = (64, 128, 256, 256)
    vae_blocks: int = 2
    vae_groups: int = 32
    vae_skip: bool = True                # linear skip around encoder and decoder
    lora_rank: int = 32
    vae_lora_rank: int = 0               # of GenDR's VAE encoder; 0: frozen
    fake_rank: int = 64                  # GenDR's rank for the score networks' LoRA
    adapter: str = "guided"              # GenDR's LoRA: "guided", "plain", or "full"
    estimator_width: int = 48
    estimator_batch: int = 32
    # training
    batch: int = 16
    learning_rate: float = 1e-4          # of the prior
    gendr_learning_rate: float = 5e-5
    student_learning_rate: float = 5e-5  # stages I and II
    critic_learning_rate: float = 1e-4
    vae_learning_rate: float = 5e-4
    estimator_learning_rate: float = 1e-3
    warmup: int = 200
    ema: float = 0.999
    clip: float = 1.0                    # gradient norm
    vae_crop: int = 128
    vae_kl: float = 1e-6
    vae_steps: int = 30_000
    prior_steps: int = 100_000
    estimator_steps: int = 5_000
    gendr_steps: int = 40_000
    adc_steps: int = 20_000
    pix_steps: int = 30_000
    ablate_steps: int = 4000             # of GenDR, for each row of --ablate
    negative: float = 0.05               # share of online negatives (S3Diff)
    guidance: float = 1.07               # S3Diff's weight; GenDR-Pix prints none
    distill: str = "cid"                 # "none", "vsd", "sid" or "cid"
    xi: float = 1.0                      # SiD's alpha; open in GenDR
    cid_guidance: float = 1.5            # f_phi's; open in GenDR, as the next six
    cid_t_min: int = 1
    cid_t_max: int = 0                   # 0: T
    lambda_cid: float = 0.1
    lambda_cid_adv: float = 0.05
    fake_steps: int = 1                  # fake score steps for each of the generator
    fake_learning_rate: float = 1e-4
    lambda_adv: float = 0.05             # GenDR-Pix, stage II: 0.05 / 1 / 0.1
    lambda_lpips: float = 1.0
    lambda_fourier: float = 0.1
    shortcut: bool = True                # add the input to the U-Net's output
    least_squares: bool = True           # start new ends in closed form
    lpips_net: str = "vgg"
    # the run
    unet_weights: str = ""               # start from these .safetensors: SD 2.1's U-Net
    vae_weights: str = ""                # and an AutoencoderKL, under diffusers' names
    seed: int = 0
    checkpointing: bool = False          # U-Net activations again in the backward pass
    precision: str = "bf16"              # autocast on CUDA; the CPU computes in fp32
    save_every: int = 1000
    log_every: int = 200


PRESETS = {
    "small": {},
    # eta_1 = 0.6 keeps the tiny chain near the mean; the README says why.
    "tiny": dict(
        crop=128, pool=4096, ranges="real-esrgan", eta_1=0.6,
        unet_widths=(48, 96, 144), unet_blocks=1, head_width=48, groups=16,
        context_tokens=4, context_width=64, vae_widths=(24, 48, 64, 64), vae_blocks=1,
        vae_groups=8, lora_rank=16, estimator_width=16, batch=8, warmup=20, ema=0.99,
        learning_rate=5e-4, gendr_learning_rate=1e-3, student_learning_rate=3e-4,
        critic_learning_rate=1e-3, fake_rank=16, fake_learning_rate=1e-3,
        vae_learning_rate=1e-3, estimator_learning_rate=3e-3, vae_crop=64,
        vae_steps=100, prior_steps=500, estimator_steps=2500, gendr_steps=300,
        adc_steps=150, pix_steps=150, ablate_steps=100, lpips_net="alex",
        precision="fp32", save_every=100, log_every=100),
    "full": dict(
        crop=512, pool=4096, unet_widths=(320, 640, 1280, 1280), context_width=1024,
        vae_widths=(128, 128, 256, 512), vae_skip=False, shortcut=False, batch=8,
        checkpointing=True, vae_lora_rank=16,
        learning_rate=1e-5, gendr_learning_rate=1e-5,
        vae_learning_rate=1e-4, vae_crop=256, vae_steps=500_000, prior_steps=500_000,
        estimator_steps=20_000, gendr_steps=100_000, adc_steps=100_000,
        pix_steps=100_000, ablate_steps=10_000),
}


def preset(name):
    """The `Config` called "tiny" (CPU, minutes), "small" (one GPU, hours) or "full"."""
    return Config(**PRESETS[name])


# ---- 2. The residual-shifting chain (read) -- ResShift, Eqs. 1-10 --------------------


def noise_like(x, rng):
    """N(0, I) in x's shape from a CPU generator, so that all devices draw alike."""
    return torch.randn(x.shape, generator=rng).to(x)


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
        self.steps, self.kappa, self.power = steps, kappa, power
        t = torch.arange(1, steps + 1, dtype=torch.float64, device="cpu")
        beta = ((t - 1) / (steps - 1)) ** power * (steps - 1)
        b0 = math.exp(math.log(eta_T / eta_1) / (2 * (steps - 1)))
        sqrt_eta = math.sqrt(eta_1) * b0 ** beta
        eta = torch.cat([0 * t[:1], sqrt_eta ** 2])
        self.eta = eta.float()
        self.alpha = torch.cat([eta[:1], eta[1:] - eta[:-1]]).float()

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
        return y0 + self.kappa * self.eta[-1].sqrt().item() * noise

    def input_scale(self, t, like, pixel=False):
        """The factor on the copy of x_t that the network sees: one size at all t.

        Latents have variance 1, so x_t has 1 + kappa^2 eta_t: scaled to variance 1.
        Pixels in [-1, 1] are divided by 1 + 3 kappa sqrt(eta_t): three sigma of noise
        still fit in [-1, 1].  Both as published; the posterior uses the unscaled x_t.
        """
        eta = self.at(self.eta, t, like)
        if pixel:
            return 1 / (3 * self.kappa * eta.sqrt() + 1)
        return 1 / (self.kappa ** 2 * eta + 1).sqrt()

    @torch.no_grad()
    def sample(self, model, y0, generator=None):
        """Run the chain from x_T down to x_0; `model(x_t, y0, t)` predicts x0.

        There is no strided sampler: the posterior is exact only between neighbours of
        the schedule the model was trained on, and T is short by design.
        """
        x = self.prior_sample(y0, noise_like(y0, generator))
        for step in range(self.steps, 0, -1):
            t = torch.full((len(y0),), step)
            mean, variance = self.posterior(x, model(x, y0, t), t)
            x = mean
            if step > 1:
                x = mean + variance.sqrt() * noise_like(y0, generator)
        return x


# ---- 3. The U-Net (read) -- Stable Diffusion 2.1's, at any width ---------------------
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


class GEGLU(nn.Module):
    """a * gelu(b), where (a, b) are the halves of one linear layer."""

    def __init__(self, width, inner):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x):
        a, b = self.proj(x).chunk(2, dim=-1)
        return a * F.gelu(b)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back; Identity keeps diffusers' numbering."""

    def __init__(self, width):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(),
                                  nn.Linear(4 * width, width)])

    def forward(self, x):
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward, each residual."""

    def __init__(self, width, heads, context_width):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context_width)
        self.norm3, self.ff = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """A transformer block on the pixels of a feature map."""

    def __init__(self, width, cfg):
        super().__init__()
        self.norm = nn.GroupNorm(cfg.groups, width, 1e-6)
        self.proj_in = nn.Linear(width, width)
        heads = max(1, width // cfg.head_width)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(width, heads, cfg.context_width)])
        self.proj_out = nn.Linear(width, width)

    def forward(self, x, context):
        h = rearrange(self.norm(x), "b c h w -> b (h w) c")
        h = self.proj_out(self.transformer_blocks[0](self.proj_in(h), context))
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    """Half the resolution; the VAE pads below and to the right only, as SD's does."""

    def __init__(self, width, asymmetric=False):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=0 if asymmetric else 1)
        self.asymmetric = asymmetric

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest neighbour to `size` (the skip's, perhaps odd), then a convolution."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x, size=None):
        size = size or (2 * x.shape[2], 2 * x.shape[3])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Block(nn.Module):
    """One level: residual blocks, each with a transformer behind it where asked for."""

    def __init__(self, channels, attend, cfg, time_width):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResBlock(i, o, cfg.groups, time_width) for i, o in channels])
        self.attentions = nn.ModuleList(
            [Transformer(o, cfg) for _, o in channels] if attend else [])


class TimeEmbedding(nn.Module):
    """t -> (cos, sin) of t 10000^(-i/half), then two linear layers.  t: (B,)."""

    def __init__(self, width):
        super().__init__()
        self.half = width // 2
        self.linear_1 = nn.Linear(width, 4 * width)
        self.linear_2 = nn.Linear(4 * width, 4 * width)

    def forward(self, t):
        i = torch.arange(self.half, device=t.device, dtype=torch.float32)
        angle = t.float()[:, None] * torch.exp(-math.log(10000) * i / self.half)
        emb = torch.cat([angle.cos(), angle.sin()], dim=1)
        emb = emb.to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(emb)))


class UNet(nn.Module):
    """Stable Diffusion 2.1's U-Net.  forward(x, t, context) -> x.

    x (B, in_channels, h, w) -> (B, out_channels, h, w), any h and w; t (B,) in
    0 .. 999; context (B, tokens, context_width).  All levels but the lowest attend.
    """

    def __init__(self, cfg, in_channels, out_channels):
        super().__init__()
        w, n, time = cfg.unet_widths, cfg.unet_blocks, 4 * cfg.unet_widths[0]
        self.cfg, last = cfg, len(w) - 1
        self.conv_in = nn.Conv2d(in_channels, w[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(w[0])
        self.down_blocks, skips = nn.ModuleList(), [w[0]]
        for i, width in enumerate(w):
            channels = [(w[max(i - 1, 0)], width)] + [(width, width)] * (n - 1)
            block = Block(channels, i < last, cfg, time)
            block.downsamplers = nn.ModuleList([Downsample(width)] if i < last else [])
            skips += [width] * (n + (i < last))
            self.down_blocks.append(block)
        self.mid_block = Block([(w[-1], w[-1])] * 2, False, cfg, time)
        self.mid_block.attentions.append(Transformer(w[-1], cfg))
        self.up_blocks, ch = nn.ModuleList(), w[-1]
        for i, width in reversed(list(enumerate(w))):
            channels = []
            for _ in range(n + 1):
                channels.append((ch + skips.pop(), width))
                ch = width
            block = Block(channels, i < last, cfg, time)
            block.upsamplers = nn.ModuleList([Upsample(width)] if i > 0 else [])
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(cfg.groups, w[0], 1e-5)
        self.conv_out = nn.Conv2d(w[0], out_channels, 3, padding=1)
        for m in self.modules():             # residual branches start at zero: for
            if isinstance(m, ResBlock):      # training from scratch, not in the paper
                nn.init.zeros_(m.conv2.weight)
                nn.init.zeros_(m.conv2.bias)
            elif isinstance(m, Transformer):
                nn.init.zeros_(m.proj_out.weight)
                nn.init.zeros_(m.proj_out.bias)
        if cfg.shortcut:                     # and so does the step away from the input
            nn.init.zeros_(self.conv_out.weight)
            nn.init.zeros_(self.conv_out.bias)

    def call(self, module, *inputs):
        """module(*inputs); with cfg.checkpointing only the inputs are kept, and the
        inside is computed again in the backward pass: time for memory."""
        if self.cfg.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)

    def encode(self, x, t, context):
        """The half before the skips return: (features, skips, time embedding)."""
        emb = self.time_embedding(t.to(x.device))
        h = self.conv_in(x)                                    # (B, w0, h, w)
        skips = [h]
        for block in self.down_blocks:
            for i, resnet in enumerate(block.resnets):
                h = self.call(resnet, h, emb)
                if block.attentions:
                    h = self.call(block.attentions[i], h, context)
                skips.append(h)
            for down in block.downsamplers:
                h = down(h)                                    # (B, wi, h/2^i, w/2^i)
                skips.append(h)
        h = self.mid_block.resnets[0](h, emb)
        h = self.mid_block.resnets[1](self.mid_block.attentions[0](h, context), emb)
        return h, skips, emb

    def forward(self, x, t, context):
        h, skips, emb = self.encode(x, t, context)
        for block in self.up_blocks:
            for i, resnet in enumerate(block.resnets):
                h = self.call(resnet, torch.cat([h, skips.pop()], dim=1), emb)
                if block.attentions:
                    h = self.call(block.attentions[i], h, context)
            for up in block.upsamplers:
                h = up(h, skips[-1].shape[2:])
        return self.conv_out(F.silu(self.conv_norm_out(h)))    # (B, out, h, w)


POSITIVE, NEGATIVE = 0, 1


class Prompts(nn.Module):
    """Two learned contexts in place of a text encoder: GenDR's two fixed prompts."""

    def __init__(self, cfg):
        super().__init__()
        shape = (2, cfg.context_tokens, cfg.context_width)
        self.table = nn.Parameter(torch.randn(shape))

    def forward(self, prompt, batch):
        """prompt: POSITIVE, NEGATIVE or a (B,) tensor of them -> (B, tokens, width)."""
        if isinstance(prompt, int):              # no copy to a GPU to wait for
            return self.table[prompt].expand(batch, -1, -1)
        return self.table[prompt.to(self.table.device)]


# ---- 4. The two kinds of ends (read) -- VAE, or pixel-(un)shuffle -------------------


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

    def forward(self, x):
        h = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        return x + rearrange(super().forward(h), "b (h w) c -> b c h w", h=x.shape[2])


class VaeLevel(nn.Module):
    """Residual blocks at one resolution, then a change of resolution or none."""

    def __init__(self, in_ch, width, blocks, groups, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResBlock(in_ch if i == 0 else width, width, groups, eps=1e-6)
             for i in range(blocks)])
        self.downsamplers = nn.ModuleList([Downsample(width, True)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(width)] if up else [])

    def forward(self, x):
        for layer in [*self.resnets, *self.downsamplers, *self.upsamplers]:
            x = layer(x)
        return x


class VaeMiddle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, width, groups):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResBlock(width, width, groups, eps=1e-6) for _ in range(2)])
        self.attentions = nn.ModuleList([VaeAttention(width, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class VaeEncoder(nn.Module):
    """(B, 3, H, W) -> (B, out_ch, H/8, W/8): four levels, halved three times."""

    def __init__(self, cfg, out_ch):
        super().__init__()
        w, n, g = cfg.vae_widths, cfg.vae_blocks, cfg.vae_groups
        self.conv_in = nn.Conv2d(3, w[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [VaeLevel(w[max(i - 1, 0)], w[i], n, g, down=i < len(w) - 1)
             for i in range(len(w))])
        self.mid_block = VaeMiddle(w[-1], g)
        self.conv_norm_out = nn.GroupNorm(g, w[-1], 1e-6)
        self.conv_out = nn.Conv2d(w[-1], out_ch, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class VaeDecoder(nn.Module):
    """(B, in_ch, h, w) -> (B, 3, f h, f w): the encoder's mirror, one block more."""

    def __init__(self, cfg, in_ch):
        super().__init__()
        w, n, g = cfg.vae_widths[::-1], cfg.vae_blocks + 1, cfg.vae_groups
        self.conv_in = nn.Conv2d(in_ch, w[0], 3, padding=1)
        self.mid_block = VaeMiddle(w[0], g)
        self.up_blocks = nn.ModuleList(
            [VaeLevel(w[max(i - 1, 0)], w[i], n, g, up=i < len(w) - 1)
             for i in range(len(w))])
        self.conv_norm_out = nn.GroupNorm(g, w[-1], 1e-6)
        self.conv_out = nn.Conv2d(w[-1], 3, 3, padding=1)

    def forward(self, z):
        h = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class VAE(nn.Module):
    """AutoencoderKL with f = 8 and 16 channels: the end of chapters 1 and 2.

    Small presets add a linear skip around each half (`vae_skip`, not in the paper):
    1x1 convolutions between the 192 channels of pixel-unshuffle and the latent.  They
    start as the principal components of 8x8 patches, and the last convolution beside
    them at zero, so that training starts from the best linear autoencoder.
    """

    def __init__(self, cfg):
        super().__init__()
        c = self.channels = cfg.latent_channels
        self.factor = 8
        self.encoder, self.decoder = VaeEncoder(cfg, 2 * c), VaeDecoder(cfg, c)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)
        self.register_buffer("scale", torch.ones(()))
        self.shuffle = PixelShuffle(self.factor) if cfg.vae_skip else None
        if cfg.vae_skip:
            self.skip_in = nn.Conv2d(self.shuffle.channels, c, 1)
            self.skip_out = nn.Conv2d(c, self.shuffle.channels, 1)

    @torch.no_grad()
    def start_from_pca(self, images):
        """Set the skips to the patches' principal axes: z = V^T (K patch - mean).

        K halves the chroma (`opponent`), as every codec does: a component is worth
        what it saves in luma.  Logvar starts at -6, a posterior deviation of 0.05.
        """
        n, c = self.shuffle.channels, self.channels
        eye = torch.eye(n, device=images.device)[:, :, None, None]
        k = self.shuffle.encode(opponent(self.shuffle.decode(eye)))
        k = k[:, :, 0, 0].T.double()                           # (192, 192)
        x = rearrange(self.shuffle.encode(images), "b c h w -> (b h w) c").double()
        x = x @ k.T
        mean = x.mean(0)
        variance, axes = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
        axes, gain = axes[:, -c:], variance[-c:].mean().rsqrt()   # unit mean variance
        self.skip_in.weight.copy_((gain * axes.T @ k)[:, :, None, None])
        self.skip_in.bias.copy_(-gain * axes.T @ mean)
        back = torch.linalg.inv(k)
        self.skip_out.weight.copy_((back @ axes / gain)[:, :, None, None])
        self.skip_out.bias.copy_(back @ mean)
        for conv in (self.quant_conv, self.decoder.conv_out):
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)
        self.quant_conv.bias[c:] = -6.0

    def posterior(self, x):
        """q(z | x) = N(mean, exp(logvar)): two (B, 16, H/8, W/8), for training only."""
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


def build_end(cfg):
    """The end of cfg.space: "latent" -> an untrained VAE, "pixel" -> PixelShuffle."""
    return VAE(cfg) if cfg.space == "latent" else PixelShuffle(8)


class ResShift(nn.Module):
    """f(x_t, y0, t): the prior of all chapters.  It predicts the clean x0.

    Input: x_t, scaled to unit variance (`input_scale`), beside y0: 2 C channels.  The
    U-Net reads t as 999 t / T, so that T meets Stable Diffusion's last timestep.
    With cfg.shortcut the U-Net predicts x0 - y0 (small presets; not in the paper).
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
        scaled = x_t * self.chain.input_scale(t, x_t, self.pixel)
        context = self.prompts(prompt, len(y0))
        out = self.unet(torch.cat([scaled, y0], dim=1), self.unet_time(t), context)
        return y0 + out if self.shortcut else out

    def unet_time(self, t):
        """The chain's t = 1 .. T on Stable Diffusion's scale of 0 .. 999."""
        return 999 * t / self.chain.steps


# ---- 5. The degradation (skim) -- Real-ESRGAN's two stages, S3Diff's mild ranges -----


@dataclass(frozen=True)
class Ranges:
    """What one degradation draws from; pairs are (first stage, second stage)."""
    sigma: tuple                         # blur: Gaussian widths, pixels
    shape: tuple                         # blur: exponents (generalised, plateau)
    resize: tuple                        # scale factors, relative to HQ and to LQ
    gaussian: tuple                      # noise: sigma of Gaussian noise, / 255
    poisson: tuple                       # noise: scale of Poisson noise
    jpeg: tuple                          # qualities
    second_blur: float                   # probability


RANGES = {
    "real-esrgan": Ranges(
        sigma=((0.2, 3.0), (0.2, 1.5)), shape=((0.5, 4.0), (1.0, 2.0)),
        resize=((0.15, 1.5), (0.3, 1.2)), gaussian=((1, 30), (1, 25)),
        poisson=((0.05, 3.0), (0.05, 2.5)), jpeg=((30, 95), (30, 95)), second_blur=0.8),
    "mild": Ranges(
        sigma=((0.2, 1.5), (0.2, 1.0)), shape=((0.5, 2.0), (1.0, 1.5)),
        resize=((0.3, 1.5), (0.6, 1.2)), gaussian=((1, 15), (1, 12)),
        poisson=((0.05, 2.0), (0.05, 1.0)), jpeg=((60, 95), (60, 100)),
        second_blur=0.5),
}
KERNELS = {"iso": 0.45, "aniso": 0.25, "generalised iso": 0.12,
           "generalised aniso": 0.03, "plateau iso": 0.12, "plateau aniso": 0.03}
RESIZE = (((0.2, 0.7, 0.1), (0.3, 0.4, 0.3)))     # up, down, keep in the two stages
SINC_BLUR, SINC_FINAL = 0.1, 0.8                  # probabilities of a sinc filter
GAUSSIAN_NOISE, GRAY_NOISE = 0.5, 0.4             # else Poisson; else per channel
BLUR_MAX, NOISE_MAX = 1.2, 16 / 255               # score 1: LQ pixels; LQ RMS on [0, 1]


class Dice:
    """The draws of one sample, all from one generator."""

    def __init__(self, generator):
        self.generator = generator

    def uniform(self, low, high):
        """A float in [low, high)."""
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def chance(self, p):
        """True with probability p."""
        return self.uniform(0, 1) < p

    def pick(self, options, weights=None):
        """One of `options`, uniformly or by weight."""
        weights = torch.ones(len(options)) if weights is None else torch.tensor(weights)
        return options[torch.multinomial(weights, 1, generator=self.generator).item()]


def gaussian_kernel(size, sigma_x, sigma_y, theta, kind, shape):
    """exp(-u^s / 2) or 1 / (1 + u^s), u = x^T Sigma^-1 x, normalised: (size, size)."""
    r = torch.arange(size) - size // 2
    y, x = torch.meshgrid(r.float(), r.float(), indexing="ij")
    a = (x * math.cos(theta) + y * math.sin(theta)) / sigma_x
    b = (-x * math.sin(theta) + y * math.cos(theta)) / sigma_y
    u = a ** 2 + b ** 2
    k = 1 / (1 + u ** shape) if "plateau" in kind else torch.exp(-0.5 * u ** shape)
    return k / k.sum()


def sinc_kernel(size, cutoff):
    """The circular low-pass c J1(c r) / (2 pi r), c in (0, pi], summing to 1."""
    r = torch.arange(size) - size // 2
    y, x = torch.meshgrid(r.double(), r.double(), indexing="ij")
    d = (x ** 2 + y ** 2).sqrt()
    k = cutoff * torch.special.bessel_j1(cutoff * d) / (2 * math.pi * d.clamp(min=1e-9))
    k[size // 2, size // 2] = cutoff ** 2 / (4 * math.pi)
    return (k / k.sum()).float()


def sinc_variance(cutoff):
    """Variance of the Gaussian whose response at `cutoff` is one half, pixels^2."""
    return 2 * math.log(2) / cutoff ** 2


def random_kernel(dice, stage, ranges):
    """A blur kernel of Real-ESRGAN's mixture and its variance per axis, pixels^2."""
    size = 2 * dice.pick(range(3, 11)) + 1                     # odd, 7 .. 21
    if dice.chance(SINC_BLUR):
        cutoff = dice.uniform(math.pi / 3 if size < 13 else math.pi / 5, math.pi)
        return sinc_kernel(size, cutoff), sinc_variance(cutoff)
    kind = dice.pick(list(KERNELS), list(KERNELS.values()))
    sigma_x = dice.uniform(*ranges.sigma[stage])
    sigma_y = sigma_x if "aniso" not in kind else dice.uniform(*ranges.sigma[stage])
    shape = 1.0
    if "generalised" in kind or "plateau" in kind:
        shape = dice.uniform(*ranges.shape["plateau" in kind])
    k = gaussian_kernel(size, sigma_x, sigma_y, dice.uniform(-math.pi, math.pi), kind,
                        shape)
    r2 = (torch.arange(size) - size // 2).float() ** 2
    return k, ((k.sum(0) * r2).sum() + (k.sum(1) * r2).sum()).item() / 2


def blur(x, kernel):
    """Filter every channel of x (B, C, H, W) by kernel (k, k), reflecting borders."""
    p, c = kernel.shape[0] // 2, x.shape[1]
    x = F.pad(x, (p, p, p, p), "reflect" if p < min(x.shape[2:]) else "replicate")
    return F.conv2d(x, kernel.to(x).expand(c, 1, -1, -1), groups=c)


def random_resize(x, dice, size):
    """x to (h, w) = size, by area, bilinear or bicubic interpolation."""
    mode = dice.pick(["area", "bilinear", "bicubic"])
    corners = {} if mode == "area" else {"align_corners": False}
    return F.interpolate(x, size=size, mode=mode, **corners)


def resize_factor(dice, stage, ranges):
    """A factor above, below or at 1, by the stage's odds."""
    low, high = ranges.resize[stage]
    direction = dice.pick(["up", "down", "keep"], RESIZE[stage])
    return {"up": dice.uniform(1, high), "down": dice.uniform(low, 1), "keep": 1.0}[
        direction]


def random_noise(x, dice, stage, ranges):
    """x (1, 3, h, w) on [0, 1] plus Gaussian or Poisson noise, coloured or grey."""
    gray = dice.chance(GRAY_NOISE)
    if dice.chance(GAUSSIAN_NOISE):
        shape = x[:, :1].shape if gray else x.shape
        sigma = dice.uniform(*ranges.gaussian[stage]) / 255
        return x + sigma * torch.randn(shape, generator=dice.generator)
    base = (luma(x) if gray else x).clamp(0, 1)                # 256 photon levels
    shot = torch.poisson(base * 256, generator=dice.generator) / 256 - base
    return x + dice.uniform(*ranges.poisson[stage]) * shot


def jpeg(x, quality):
    """x (1, 3, h, w) on [0, 1] through Pillow's JPEG codec."""
    buffer = io.BytesIO()
    to_pil(x * 2 - 1).save(buffer, "JPEG", quality=int(quality))
    return to_unit(from_pil(Image.open(buffer)))


def degrade_one(hq, cfg, dice):
    """One picture (1, 3, H, W) in [0, 1] -> LQ (1, 3, H/s, W/s), blur, noise score."""
    ranges, (height, width) = RANGES[cfg.ranges], hq.shape[2:]
    small = (height // cfg.scale, width // cfg.scale)
    # Two copies take the same blurs and resizes, but only the first gets the noise
    # and the JPEG: their difference at the end is the true noise.
    x, variance = hq.expand(2, -1, -1, -1), 0.0                # variance in LQ pixels^2
    for stage in (0, 1):
        pixel = x.shape[2] / small[0]                          # LQ pixel, in x's pixels
        if stage == 0 or dice.chance(ranges.second_blur):
            kernel, v = random_kernel(dice, stage, ranges)
            x, variance = blur(x, kernel), variance + v / pixel ** 2
        factor = resize_factor(dice, stage, ranges)
        base = (height, width) if stage == 0 else small
        size = [max(1, int(n * factor)) for n in base]
        x = random_resize(x, dice, size)
        if size[0] < small[0]:                                 # lost above f pi
            variance += sinc_variance(math.pi * size[0] / small[0]) - sinc_variance(
                math.pi)
        noisy = random_noise(x[:1], dice, stage, ranges).clamp(0, 1)
        if stage == 0:
            noisy = jpeg(noisy, dice.uniform(*ranges.jpeg[0]))
        x = torch.cat([noisy, x[1:]])
    sinc_first, final_sinc = dice.chance(0.5), dice.chance(SINC_FINAL)
    cutoff, quality = dice.uniform(math.pi / 3, math.pi), dice.uniform(*ranges.jpeg[1])
    if not sinc_first:
        x = torch.cat([jpeg(x[:1].clamp(0, 1), quality), x[1:]])
    x = random_resize(x, dice, small)
    if final_sinc:
        x, variance = blur(x, sinc_kernel(21, cutoff)), variance + sinc_variance(cutoff)
    if sinc_first:
        x = torch.cat([jpeg(x[:1].clamp(0, 1), quality), x[1:]])
    lq, clean = x.clamp(0, 1).chunk(2)
    noise = (lq - clean).square().mean().sqrt().item()
    return lq, min(1.0, variance ** 0.5 / BLUR_MAX), min(1.0, noise / NOISE_MAX)


def degrade(hq, cfg, generator):
    """Real-ESRGAN's two stages: hq (B, 3, H, W) -> lq (B, 3, H/s, W/s), scores (B, 2).

    blur, resize, noise, JPEG; blur (p), resize, noise; then resize to H/s with a sinc
    filter, and JPEG before or after it.  lq is in [-1, 1] on 8-bit levels.  The scores
    are true strengths, not estimates (S3Diff learns them by ranking): blur, the width
    of all filters together (LQ pixels / BLUR_MAX), and noise, the RMS of what noise
    and JPEG left in lq (/ NOISE_MAX), both cut at 1.
    """
    pictures, scores = [], []
    for picture in to_unit(hq.cpu()).split(1):
        lq, *score = degrade_one(picture, cfg, Dice(generator))
        pictures.append((lq * 255).round() / 255)
        scores.append(score)
    return torch.cat(pictures) * 2 - 1, torch.tensor(scores)


# ---- 6. Pictures and metrics (skim) --------------------------------------------------


class UserError(Exception):
    """What the user can mend: one line on stderr, exit code 2."""


def to_unit(x):
    """[-1, 1] -> [0, 1], clamped."""
    return (x.clamp(-1, 1) + 1) / 2


def to_bytes(x):
    """[-1, 1] -> uint8, rounded."""
    return (to_unit(x) * 255).round().to(torch.uint8)


def from_bytes(x):
    """uint8 -> [-1, 1]."""
    return x.float() / 127.5 - 1


def to_pil(x):
    """(1, 3, H, W) in [-1, 1] -> a Pillow picture."""
    return Image.fromarray(rearrange(to_bytes(x[0]), "c h w -> h w c").cpu().numpy())


def from_pil(picture):
    """A Pillow picture -> (1, 3, H, W) in [-1, 1]."""
    array = np.array(picture.convert("RGB"))
    return from_bytes(rearrange(torch.from_numpy(array), "h w c -> 1 c h w"))


def open_picture(path):
    """The file as a viewer would show it: a Pillow picture in RGB or RGBA."""
    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I") or picture.mode == "F":
                array = np.array(picture, dtype=np.float64)    # 16 bits and more
                deep = picture.mode.startswith("I;16") or array.max() > 255
                array = array / 257 if deep else array
                picture = Image.fromarray(array.clip(0, 255).round().astype(np.uint8))
            alpha = "A" in picture.getbands() or "transparency" in picture.info
            return picture.convert("RGBA" if alpha else "RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable picture ({error})") from None


def read_picture(path):
    """(1, 3, H, W) in [-1, 1] from any picture file; alpha is dropped."""
    return from_pil(open_picture(path))


def picture_files(folder):
    """The pictures of a folder, sorted; UserError where there are none."""
    kinds = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
    files = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in kinds)
    if not files:
        raise UserError(f"{folder}: no pictures in this folder")
    return files


def upsample(lq, scale):
    """Bicubic (a = -0.5, as Pillow and Matlab have it): (B, 3, h, w) -> s times."""
    size = (lq.shape[2] * scale, lq.shape[3] * scale)
    return F.interpolate(lq, size=size, mode="bicubic", antialias=True).clamp(-1, 1)


def luma(x):
    """Full-range BT.601 luma of [0, 1] RGB: (B, 3, H, W) -> (B, 1, H, W)."""
    weights = torch.tensor([0.299, 0.587, 0.114]).to(x).view(1, 3, 1, 1)
    return (x * weights).sum(1, keepdim=True)


def opponent(x):
    """RGB with its chroma halved: y + (x - y) / 2, y its luma.  Not in the paper."""
    y = luma(x)
    return y + (x - y) / 2


def studio_y(x):
    """Y of BT.601 in 16 .. 235, from [0, 1] RGB, unrounded: (B, 1, H, W)."""
    weights = torch.tensor([65.481, 128.553, 24.966]).to(x).view(1, 3, 1, 1)
    return (x * weights).sum(1, keepdim=True) + 16


def psnr(a, b):
    """10 log10(255^2 / MSE) on unrounded Y, no border crop: (B,) dB from [0, 1]."""
    mse = (studio_y(a.double()) - studio_y(b.double())).square().mean((1, 2, 3))
    return 10 * torch.log10(255 ** 2 / mse)


def ssim(a, b):
    """SSIM on 8-bit Y, 11x11 Gaussian of 1.5, valid region: (B,), from [0, 1].

    ((2 mu_a mu_b + C1) / (mu_a^2 + mu_b^2 + C1)) ((2 cov + C2) / (var_a + var_b + C2)),
    Wang et al. 2004, with negative contrast terms clamped at 0.
    """
    a, b = studio_y(a.double()).round(), studio_y(b.double()).round()
    window = gaussian_kernel(11, 1.5, 1.5, 0.0, "iso", 1.0).double()[None, None]
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mu_a, mu_b, aa, bb, ab = (F.conv2d(x, window.to(a)) for x in
                              (a, b, a * a, b * b, a * b))
    contrast = (2 * (ab - mu_a * mu_b) + c2) / (aa - mu_a ** 2 + bb - mu_b ** 2 + c2)
    luminance = (2 * mu_a * mu_b + c1) / (mu_a ** 2 + mu_b ** 2 + c1)
    return (luminance * contrast.clamp(min=0)).mean((1, 2, 3))


class Perceptual(nn.Module):
    """LPIPS of images in [-1, 1]: forward(a, b) -> (B,).  `name` says what measured.

    The package brings LPIPS' trained heads; torchvision downloads the backbone on
    first use.  Where it cannot, the same network runs with a backbone at a fixed
    random seed, and every number of it is called "LPIPS (random features)".
    """
    FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}

    def __init__(self, net):
        super().__init__()
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")                    # torchvision's old API
            torch.manual_seed(0)
            try:
                self.model = lpips.LPIPS(net=net, verbose=False)
                self.name = f"LPIPS ({net})"
            except OSError:                                    # URLError is one
                place = Path(torch.hub.get_dir()) / "checkpoints" / self.FILES[net]
                print(f"LPIPS: no backbone; random features instead. For the real one "
                      f"put {self.FILES[net]} (torchvision) into {place.parent}")
                self.model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
                self.name = "LPIPS (random features)"
        self.requires_grad_(False).eval()

    def forward(self, a, b):
        return self.model(a, b).flatten()


# ---- 7. Training pairs (read) --------------------------------------------------------


def device():
    """The GPU of this process, or the CPU; inside `with torch.device("meta")`, that."""
    if torch.get_default_device().type == "meta":
        return torch.device("meta")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_device(x):
    """x on `device()`; to a GPU by way of pinned memory, without waiting for it."""
    if device().type == "cuda":
        return x.pin_memory().to(device(), non_blocking=True)
    return x.to(device())


def autocast(cfg):
    """bf16 autocast on CUDA where the preset asks for it; plain fp32 otherwise."""
    on = cfg.precision == "bf16" and device().type == "cuda"
    return torch.autocast(device().type, dtype=torch.bfloat16, enabled=on)


def world():
    """(rank of this process, number of processes): (0, 1) unless under torchrun."""
    d = torch.distributed
    joined = d.is_available() and d.is_initialized()
    return (d.get_rank(), d.get_world_size()) if joined else (0, 1)


def per_sample(draw, count):
    """This process's share of draw(n), n the samples of all processes together.

    With it N processes see what one process with N times the batch would see.
    """
    rank, size = world()
    return draw(size * count)[rank * count:(rank + 1) * count]


def batch_noise(x, rng):
    """N(0, I) in the shape of a training batch x, drawn for all processes."""
    return per_sample(lambda n: torch.randn(n, *x.shape[1:], generator=rng),
                      len(x)).to(x)


def place(model):
    """The model on `device()`; on a GPU its convolutions' weights in channels_last."""
    if device().type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    return model.to(device())


class Pool:
    """Degraded pairs, made once: `hq`, `lq` (uint8) and `scores`, plus what is added.

    A frozen network's outputs on the pool need computing only once: `add` keeps them.
    """

    def __init__(self, cfg):
        self.cfg, rng = cfg, torch.Generator().manual_seed(cfg.seed)
        photos = [to_bytes(read_picture(f)) for f in picture_files(cfg.train_data)]
        photos = [p for p in photos if min(p.shape[2:]) >= cfg.crop]
        if not photos:
            raise UserError(f"{cfg.train_data}: no picture has a {cfg.crop} pixel crop")
        dice, pairs = Dice(rng), []
        for _ in tqdm(range(cfg.pool), "degraded pairs", disable=quiet()):
            hq = random_crop(from_bytes(dice.pick(photos)), cfg.crop, dice)
            lq, scores = degrade(hq, cfg, rng)
            pairs.append((to_bytes(hq), to_bytes(lq), scores))
        hq, lq, scores = (torch.cat(column) for column in zip(*pairs))
        self.columns = {"hq": hq, "lq": lq, "scores": scores}

    def __len__(self):
        return len(self.columns["hq"])

    def rows(self, index):
        """The rows of `index` on the device; pictures as float, `lq_up` on the way."""
        batch = {name: to_device(column[index]) for name, column in
                 self.columns.items()}
        batch = {name: from_bytes(x) if x.dtype == torch.uint8 else x
                 for name, x in batch.items()}
        batch["lq_up"] = upsample(batch["lq"], self.cfg.scale)
        return batch

    def batch(self, rng):
        """cfg.batch random rows, others in every process."""
        return self.rows(per_sample(
            lambda n: torch.randint(len(self), (n,), generator=rng), self.cfg.batch))

    def with_batch(self, size):
        """The same pool, dealt in batches of another size."""
        other = copy.copy(self)
        other.cfg = dataclasses.replace(self.cfg, batch=size)
        return other

    @torch.no_grad()
    def add(self, name, function):
        """Keep function(rows) under `name`, computed once, a batch at a time.

        Images go in as they come out, in float: rounding them would teach the
        students a grid of 1/255 that the teacher does not have.
        """
        out = []
        for index in tqdm(torch.arange(len(self)).split(self.cfg.batch),
                          f"pool: {name}", disable=quiet()):
            out.append(function(self.rows(index)).float().cpu())
        self.columns[name] = torch.cat(out)


def quiet():
    """tqdm's `disable`: no bars where stderr is no terminal, or from other ranks."""
    return True if world()[0] > 0 else None


def random_crop(photo, size, dice):
    """A size x size crop of photo (1, 3, H, W): shrunk, turned, mirrored, recoloured.

    Half of the crops come from a photo scaled down by 1 .. 0.5, half get their colour
    channels permuted: few photographs must teach many.
    """
    if dice.chance(0.5):
        factor = dice.uniform(max(0.5, size / min(photo.shape[2:])), 1)
        shape = [max(size, round(n * factor)) for n in photo.shape[2:]]
        photo = F.interpolate(photo, size=shape, mode="bicubic", antialias=True)
    y, x = (int(dice.uniform(0, n - size + 1)) for n in photo.shape[2:])
    crop = photo[:, :, y:y + size, x:x + size]
    crop = torch.rot90(crop, dice.pick(range(4)), (2, 3))
    if dice.chance(0.5):
        crop = crop[:, torch.randperm(3, generator=dice.generator)]
    return (crop.flip(3) if dice.chance(0.5) else crop).clamp(-1, 1)


@dataclass(frozen=True)
class Held:
    """One held-out pair: hq, lq (1, 3, ., .) in [-1, 1], its true scores, its name."""
    name: str
    hq: torch.Tensor
    lq: torch.Tensor
    scores: torch.Tensor


def held_out(cfg, folder=None):
    """Held-out photos, each degraded with a seed of its own, whatever cfg.seed.

    A folder with lq/ and hq/ inside gives real pairs, file by file; scores are nan.
    """
    folder, pairs = Path(folder or cfg.val_data), []
    if (folder / "lq").is_dir():
        both = [picture_files(folder / name) for name in ("hq", "lq")]
        if len(both[0]) != len(both[1]):
            raise UserError(f"{folder}: hq/ and lq/ differ in number")
        for hq_file, lq_file in zip(*both):
            hq, lq = (read_picture(f).to(device()) for f in (hq_file, lq_file))
            if hq.shape[2:] != tuple(n * cfg.scale for n in lq.shape[2:]):
                raise UserError(f"{hq_file}: not {cfg.scale} times as large as "
                                f"{lq_file}")
            pairs.append(Held(hq_file.stem, hq, lq, torch.full((1, 2), math.nan)))
        return pairs
    for i, file in enumerate(picture_files(folder)):
        hq = read_picture(file)
        s = 8 * cfg.scale
        if min(hq.shape[2:]) < s:
            raise UserError(f"{file}: smaller than {s} pixels")
        hq = hq[:, :, :hq.shape[2] // s * s, :hq.shape[3] // s * s]
        lq, scores = degrade(hq, cfg, torch.Generator().manual_seed(10_000 + i))
        pairs.append(Held(file.stem, hq.to(device()), lq.to(device()), scores))
    return pairs


# ---- 8. One training loop for every stage (read) -------------------------------------


class Run:
    """A folder runs/NAME that one process at a time may write."""

    def __init__(self, folder, cfg, lock=True):
        self.folder, self.cfg = Path(folder), cfg
        if world()[0] > 0:                                     # rank 0 alone writes
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot write there ({error})") from None
        if lock:
            self.lock()
        settings = json.loads(json.dumps(dataclasses.asdict(cfg)))
        file = self.folder / "config.json"
        if file.exists() and json.loads(file.read_text()) != settings:
            old = json.loads(file.read_text())
            names = [k for k in {**old, **settings} if old.get(k) != settings.get(k)]
            raise UserError(f"{folder} was trained with another {', '.join(names)}; "
                            "choose another --run or remove it")
        write_file(file, json.dumps(settings, indent=1))

    def lock(self):
        """Hold runs/NAME/lock until the process ends, however it ends (POSIX only)."""
        try:
            import fcntl
        except ImportError:                                    # Windows: no lock
            return
        self.lock_file = open(self.folder / "lock", "w")
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.folder}: another process writes this run") from None

    def part(self, name, **change):
        """A run in a folder of this one, under its lock, with some numbers changed.

        A stage's seed comes from its name and cfg.seed alone, so that the same stage
        in two parts starts from the same weights and sees the same batches.
        """
        return Run(self.folder / name, dataclasses.replace(self.cfg, **change),
                   lock=False)

    def forget(self, stage, step):
        """Drop a stage's rows of log.csv after `step`: a resumed stage writes anew."""
        file = self.folder / "log.csv"
        if file.exists():
            rows = [line for line in file.read_text().splitlines(keepends=True)
                    if not line.startswith(f"{stage},")
                    or int(line.split(",")[1]) <= step]
            write_file(file, "".join(rows))

    def log(self, stage, step, values):
        """Append one row a value to log.csv: stage, step, name, value."""
        if world()[0] > 0:
            return
        file = self.folder / "log.csv"
        new = not file.exists()
        with open(file, "a", newline="") as f:
            rows = csv.writer(f)
            if new:
                rows.writerow(["stage", "step", "name", "value"])
            rows.writerows([stage, step, k, f"{v:.6g}"] for k, v in values.items())


def check_config(cfg, data=True):
    """Refuse, before anything is written, what would fail in the middle of a run."""
    wrong = [
        (cfg.adapter not in ("guided", "plain", "full"),
         "adapter is guided, plain or full"),
        (cfg.distill not in ("none", "vsd", "sid", "cid"),
         "distill is none, vsd, sid or cid"),
        (not 1 <= cfg.cid_t_min <= (cfg.cid_t_max or cfg.steps) <= cfg.steps,
         "cid_t_min and cid_t_max are in 1 .. steps"),
        (cfg.ranges not in RANGES, f"ranges is one of {', '.join(RANGES)}"),
        (cfg.space not in ("latent", "pixel"), "space is latent or pixel"),
        (cfg.precision not in ("fp32", "bf16"), "precision is fp32 or bf16"),
        (len(cfg.vae_widths) != 4, "vae_widths has four levels: f = 8"),
        (cfg.crop % (8 * cfg.scale) > 0, f"crop is a multiple of {8 * cfg.scale}"),
        (cfg.vae_crop > cfg.crop or cfg.vae_crop % 8 > 0,
         "vae_crop is a multiple of 8, at most crop")]
    for bad, rule in wrong:
        if bad:
            raise UserError(rule)
    if data:
        picture_files(cfg.train_data)


def write_file(path, data):
    """Write text, or call data(path), to a temporary file, then rename it; rank 0's."""
    if world()[0] > 0:
        return
    temporary = Path(f"{path}.tmp")
    if callable(data):
        data(temporary)
    else:
        temporary.write_text(data)
    os.replace(temporary, path)


def save_weights(module, path):
    """A module's state as .safetensors; shared tensors are written once a name."""
    state = {k: v.detach().cpu().contiguous().clone() for k, v in
             module.state_dict().items()}
    write_file(path, lambda p: save_file(state, p))


def read_weights(path):
    """{name: tensor} of a .safetensors file; UserError where it is none."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is the run trained?") from None
    except Exception as error:                                 # truncated, not ours
        raise UserError(f"{path}: not a weights file ({error})") from None


def load_weights(module, path):
    """Load a .safetensors file; UserError names the first key that does not fit."""
    return fit_weights(module, read_weights(path), path)


def fit_weights(module, state, path):
    """Load a state dict; UserError names the first key or shape that does not fit."""
    own = module.state_dict()
    for key in [*own, *state]:
        if key not in own or key not in state:
            where = "this network" if key in state else "the file"
            raise UserError(f"{path}: {key} is not in {where}")
        if own[key].shape != state[key].shape:
            raise UserError(f"{path}: {key} is {tuple(state[key].shape)}, not "
                            f"{tuple(own[key].shape)}")
    module.load_state_dict(state)
    return module


@contextmanager
def frozen(modules):
    """Inside, gradients pass through these modules but none stay in their parameters.

    What was frozen already is frozen afterwards, too.
    """
    trained = [p for m in modules for p in m.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


class Player(nn.Module):
    """A turn's losses as a forward pass, which is what DistributedDataParallel wraps:
    it averages over all processes the gradients of `module`'s trained parameters."""

    def __init__(self, module, losses):
        super().__init__()
        self.module, self.losses = module, losses

    def forward(self, batch, rng):
        return self.losses(batch, rng)


@dataclass
class Turn:
    """One player's move: losses(batch, rng) -> {name: weighted loss} for `module`.

    A stage is a list of turns; their order is the order of play.  Every turn has its
    own optimizer, over those parameters of `module` that require gradients, and makes
    `times` steps in a row on the same batch.
    """
    name: str
    module: nn.Module
    losses: object
    learning_rate: float
    times: int = 1

    def start(self, cfg):
        """Make the optimizer: AdamW, with the betas of the adversarial literature."""
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, self.learning_rate,
                                           betas=(0.9, 0.99), weight_decay=0.0)
        self.player = Player(self.module, self.losses)
        if world()[1] > 1:
            self.player = nn.parallel.DistributedDataParallel(self.player)

    def play(self, batch, rng, cfg, rate):
        """One optimizer step; returns the losses as floats' tensors, detached."""
        with autocast(cfg):
            losses = self.player(batch, rng)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * rate
        self.optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, cfg.clip)
        if not torch.isfinite(norm):                           # one sync a step
            bad = [k for k, v in losses.items() if not torch.isfinite(v)]
            raise FloatingPointError(f"{self.name}: not finite: "
                                     f"{', '.join(bad) or 'the gradient'}")
        self.optimizer.step()
        return {k: v.detach() for k, v in losses.items()}


def learning_rate_factor(step, steps, warmup):
    """Linear warm-up, then half a cosine down to 0; step counts from 0."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


class Ema:
    """An exponential moving average of the first player's trained parameters."""

    def __init__(self, parameters, decay):
        self.parameters, self.decay, self.count = parameters, decay, 0
        self.shadow = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self):
        """shadow <- d shadow + (1 - d) p; d rises to its value over the first steps."""
        self.count += 1
        d = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.shadow, self.parameters, 1 - d)

    @torch.no_grad()
    def swap(self):
        """Exchange the parameters with their average; twice is the identity."""
        for p, s in zip(self.parameters, self.shadow):
            keep = p.clone()
            p.copy_(s)
            s.copy_(keep)


def train(run, stage, turns, pool, steps, watch=None):
    """Play `turns` for `steps` steps; leave the averaged weights in turns[0].module.

    In each turn all players but one are frozen: gradients pass through them, none stay.
    Random draws of a step come from a generator seeded by (seed, stage, step), so a
    resumed run repeats an uninterrupted one; on the CPU bit for bit.  A checkpoint
    runs/NAME/STAGE.ckpt is renamed into place every cfg.save_every steps.  `watch()`
    returns figures to print beside the losses; it must not touch any global generator.
    """
    cfg, file = run.cfg, run.folder / f"{stage}.ckpt"
    for turn in turns:
        turn.start(cfg)
    ema, first = Ema(turns[0].parameters, cfg.ema), 0
    if file.exists():
        first = load_checkpoint(file, turns, ema)
        run.forget(stage, first)
        print(f"{stage}: resuming at step {first}")
    bar = tqdm(range(first, steps), stage, steps, initial=first, disable=quiet())
    started, mean = time.time(), {}
    for step in bar:
        rng = torch.Generator().manual_seed(stage_seed(cfg, stage, step))
        batch, losses = pool.batch(rng), {}
        for turn in turns:
            rate = learning_rate_factor(step, steps, cfg.warmup)
            with frozen([other.module for other in turns if other is not turn]):
                for _ in range(turn.times):
                    losses |= turn.play(batch, rng, cfg, rate)
        ema.update()
        for k, v in losses.items():
            mean.setdefault(k, []).append(v)
        done = step + 1
        if done % max(cfg.log_every, steps // 10) == 0 or done == steps:
            values = {k: torch.stack(v).mean().item() for k, v in mean.items()}
            ema.swap()
            values |= watch() if watch and world()[0] == 0 else {}
            ema.swap()
            each = (time.time() - started) / (done - first)
            run.log(stage, done, values)
            text = "  ".join(f"{k} {v:8.4f}" for k, v in values.items())
            tqdm.write(f"{stage:9s} {done:6d}/{steps}  {text}  {1000 * each:5.0f} ms  "
                       f"{each * (steps - done):5.0f} s left")
            mean = {}
        if done % cfg.save_every == 0 and done < steps:
            save_checkpoint(file, turns, ema, done)
    ema.swap()


def save_checkpoint(file, turns, ema, step):
    """Everything a resumed stage needs: weights, moments, averages, the step."""
    state = {"step": step, "count": ema.count, "shadow": ema.shadow,
             "modules": [t.module.state_dict() for t in turns],
             "optimizers": [t.optimizer.state_dict() for t in turns]}
    write_file(file, lambda p: torch.save(state, p))


def load_checkpoint(file, turns, ema):
    """The inverse of `save_checkpoint`; returns the step to go on from."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    for turn, module, optimizer in zip(turns, state["modules"], state["optimizers"]):
        turn.module.load_state_dict(module)
        turn.optimizer.load_state_dict(optimizer)
    ema.count = state["count"]
    ema.shadow = [s.to(p.device) for s, p in zip(state["shadow"], ema.parameters)]
    return state["step"]


# ---- 9. Chapter 1: autoencoder and prior (read) --------------------------------------


def train_vae(run, vae, pool):
    """|| opponent(x - D(z)) ||^2 + KL weight * KL(q(z | x) || N(0, I)), on small crops.

    With cfg.vae_weights the weights come from that file instead.  Afterwards `scale`
    makes the encoded HQ crops' variance 1, once and for all.
    """
    cfg = run.cfg
    if cfg.vae_skip:
        vae.start_from_pca(pool.rows(torch.arange(min(512, len(pool))))["hq"])

    def losses(batch, rng):
        y, x = torch.randint(cfg.crop - cfg.vae_crop + 1, (2,), generator=rng).tolist()
        hq = batch["hq"][:, :, y:y + cfg.vae_crop, x:x + cfg.vae_crop]
        mean, logvar = vae.posterior(hq)
        z = mean + (logvar / 2).exp() * batch_noise(mean, rng)
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        error = opponent(vae.decode(z * vae.scale) - hq).square().mean()
        return {"mse": error, "kl": cfg.vae_kl * kl}
    if cfg.vae_weights:
        state = read_autoencoder(cfg.vae_weights) | {"scale": vae.scale}
        fit_weights(vae, state, cfg.vae_weights)
    else:
        train(run, "vae", [Turn("vae", vae, losses, cfg.vae_learning_rate)], pool,
              cfg.vae_steps)
    with torch.no_grad():
        z = vae.encode(pool.rows(torch.arange(min(64, len(pool))))["hq"])
        vae.scale.copy_(z.std().reciprocal())


OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_autoencoder(path):
    """An AutoencoderKL's state under today's names of diffusers."""
    def new(key):
        return ".".join(OLD_NAMES.get(part, part) for part in key.split("."))
    return {new(k): v.float() for k, v in read_weights(path).items()}


def with_shapes_of(cfg, path):
    """cfg with the widths, blocks and latent channels of an AutoencoderKL's file.

    No shape tells the number of GroupNorm's groups: it is 32, diffusers' default.
    """
    state = read_autoencoder(path)
    level = "encoder.down_blocks.{}.resnets.{}.conv1.weight"
    for key in ("decoder.conv_in.weight", *(level.format(i, 0) for i in range(4))):
        if key not in state:
            raise UserError(f"{path}: no {key}: not an f = 8 AutoencoderKL")
    widths = tuple(state[level.format(i, 0)].shape[0] for i in range(4))
    blocks = next(i for i in range(1, 99) if level.format(0, i) not in state)
    return dataclasses.replace(
        cfg, vae_widths=widths, vae_blocks=blocks, vae_skip=False, vae_groups=32,
        latent_channels=state["decoder.conv_in.weight"].shape[1])


@torch.no_grad()
def start_from_stable_diffusion(prior, path, pool):
    """Start the prior from a UNet2DConditionModel's weights (.safetensors).

    Every key but conv_in and conv_out must fit.  Those two have k channels in the file
    and C here.  The k principal axes P of HQ latents are the least-squares way from
    one to the other: conv_in'(y0) = conv_in(P (y0 - mean)), on y0's half of the input,
    and conv_out' = mean + P^+ conv_out.  For k = C they are taken as they are.  Not
    in the paper.  Stable Diffusion predicts noise (or v); training turns that into x0.
    """
    unet, state = prior.unet, {k: v.float() for k, v in read_weights(path).items()}
    names = [f"conv_{end}.{kind}" for end in ("in", "out") for kind in
             ("weight", "bias")]
    if any(name not in state for name in names):
        raise UserError(f"{path}: no conv_in and conv_out: not a UNet2DConditionModel")
    w_in, b_in, w_out, b_out = (state[name].to(device()) for name in names)
    own = unet.state_dict()
    fit_weights(unet, state | {name: own[name] for name in names}, path)
    k, c = w_in.shape[1], unet.conv_out.out_channels
    z = rearrange(pool.rows(torch.arange(min(256, len(pool))))["z_hq"],
                  "b c h w -> (b h w) c")
    mean, down, up = 0 * z[0], torch.eye(c).to(z), torch.eye(c).to(z)
    if k != c:
        mean = z.mean(0)
        variance, axes = torch.linalg.eigh(torch.cov(z.T))
        std, axes = variance[-k:].sqrt(), axes[:, -k:]         # (k,), (C, k)
        down, up = (axes / std).T, axes * std                  # P and its inverse
        print(f"resshift: {path}: {k} channels replaced by {c}, least-squares start")
    unet.conv_in.weight[:, :c] = 0
    unet.conv_in.weight[:, c:] = torch.einsum("okxy,kc->ocxy", w_in, down)
    unet.conv_in.bias.copy_(b_in - torch.einsum("okxy,kc,c->o", w_in, down, mean))
    unet.conv_out.weight.copy_(torch.einsum("ck,kixy->cixy", up, w_out))
    unet.conv_out.bias.copy_(up @ b_out + mean)


def prior_turns(prior, cfg):
    """E_t || f(x_t, y0, t) - x0 ||^2, t uniform, on the pool's z_hq and z_lq.

    The KL weights are left out, as the paper does.  A share cfg.negative of samples
    has the negative prompt and the target y0 (S3Diff's trick; not in ResShift): that
    is what the negative prompt means in the chapters to come.
    """
    def losses(batch, rng):
        y0 = batch["z_lq"]
        t = per_sample(lambda n: torch.randint(1, cfg.steps + 1, (n,), generator=rng),
                       len(y0))
        prompt, x0 = negatives(batch, "z_hq", "z_lq", rng, cfg)
        x_t = prior.chain.q_sample(x0, y0, t, batch_noise(x0, rng))
        return {"mse": F.mse_loss(prior(x_t, y0, t, prompt), x0)}
    return [Turn("prior", prior, losses, cfg.learning_rate)]


def train_prior(run, prior, pool, watch=None):
    """`prior_turns` from a random start, or from the file cfg.unet_weights."""
    cfg = run.cfg
    if cfg.unet_weights:
        start_from_stable_diffusion(prior, cfg.unet_weights, pool)
    train(run, "resshift", prior_turns(prior, cfg), pool, cfg.prior_steps, watch)


def negatives(batch, positive, negative, rng, cfg):
    """S3Diff's online negatives: with probability p the target is the LQ itself.

    Returns (prompt (B,), target): where the prompt is NEGATIVE the target is
    batch[negative], elsewhere batch[positive].
    """
    target, size = batch[positive], len(batch[positive])
    draw = per_sample(lambda n: torch.rand(n, generator=rng), size)
    prompt = (draw < cfg.negative).long().to(target.device)
    chosen = (prompt == NEGATIVE).view(-1, 1, 1, 1)
    return prompt, torch.where(chosen, batch[negative], target)


@torch.no_grad()
def error_by_time(prior, pool, cfg):
    """Mean squared error of x0 for every t = 1 .. T, on 64 pairs: T floats."""
    rng = torch.Generator().manual_seed(0)
    rows, errors = pool.rows(torch.arange(min(64, len(pool)))), []
    x0, y0 = rows["z_hq"], rows["z_lq"]
    noise = noise_like(x0, rng)
    for step in range(1, cfg.steps + 1):
        t = torch.full((len(x0),), step)
        x_t = prior.chain.q_sample(x0, y0, t, noise)
        errors.append(F.mse_loss(prior(x_t, y0, t), x0).item())
    return errors


def chapter(run, name, build, teach):
    """build()'s model with its weights: loaded if runs/NAME has them, else taught now.

    The global generator is seeded for each chapter, so that a chapter's start does not
    depend on which chapters before it were trained or loaded.
    """
    torch.manual_seed(stage_seed(run.cfg, name, 0))
    model, file = place(build()), run.folder / f"{name}.safetensors"
    if file.exists():
        load_weights(model, file)
        print(f"{name}: loaded")
    else:
        teach(model)
        save_weights(model, file)
        if world()[0] == 0:
            (run.folder / f"{name}.ckpt").unlink(missing_ok=True)
    return model.requires_grad_(False).eval()


def stage_seed(cfg, name, step):
    """A seed of its own for every run seed, stage and step."""
    salt = sum(ord(c) * 31 ** i for i, c in enumerate(name)) % 1_000_003
    return ((cfg.seed * 1_000_003 + salt) * 10 ** 7 + step) % 2 ** 63


def chapter_end(run, pool):
    """The end of cfg.space, trained if it is a VAE; the pool's latents through it."""
    cfg, end = run.cfg, build_end(run.cfg)
    if cfg.space == "latent":
        end = chapter(run, "vae", lambda: VAE(cfg), lambda m: train_vae(run, m, pool))
    pool.add("z_hq", lambda rows: end.encode(rows["hq"]))
    pool.add("z_lq", lambda rows: end.encode(rows["lq_up"]))
    return end


def chapter_one(run, pool, pairs):
    """(end, prior): train what is missing.  `pool` gains z_hq and z_lq."""
    cfg, end = run.cfg, chapter_end(run, pool)

    def watch(prior):
        return {"psnr": mean_psnr(lambda p: sample(prior, end, p.lq, cfg), pairs[:3]),
                "bicubic": mean_psnr(lambda p: upsample(p.lq, cfg.scale), pairs[:3])}

    def teach(model):
        train_prior(run, model, pool, lambda: watch(model))
        errors = error_by_time(model, pool, cfg)
        run.log("resshift", cfg.prior_steps,
                {f"mse at t={i + 1}": e for i, e in enumerate(errors)})
        print("mse of x0 at t = 1 .. T:", " ".join(f"{e:.3f}" for e in errors))
    return end, chapter(run, "resshift", lambda: ResShift(cfg), teach)


COMPARED = {                             # all with the paper's eta_1 and eta_T
    "kappa 2, p 0.3 (paper)": {},
    "weaker noise, kappa 0.5": dict(kappa=0.5),
    "stronger noise, kappa 8": dict(kappa=8.0),
    "slower shifting, p 1": dict(power=1.0),
    "faster shifting, p 0.1": dict(power=0.1),
    "from noise: kappa 40, p 0.8": dict(kappa=40.0, power=0.8),
    "T = 4": dict(steps=4),
}


def compare(run, pairs, lpips):
    """One prior a row of COMPARED, on one VAE and pool, with one budget and seed: all
    rows start from the same weights and see the same batches, t and noise (T = 4 its
    own t).

    Prints PSNR, SSIM, LPIPS and ms a picture on the held-out photos, and returns the
    table.  Interrupted, it goes on with the row it was in.
    """
    pool = Pool(run.cfg)
    end, table = chapter_end(run, pool), {}
    for i, (name, change) in enumerate(COMPARED.items()):
        row = run.part(f"row{i}", **(dict(eta_1=0.0, eta_T=0.999) | change))
        cfg = row.cfg
        prior = chapter(row, "resshift", lambda: ResShift(cfg),
                        lambda m: train_prior(row, m, pool))
        sample(prior, end, pairs[0].lq, cfg)                   # a warm-up
        started = time.time()
        pictures = {p.name: sample(prior, end, p.lq, cfg).cpu() for p in pairs}
        each = 1000 * (time.time() - started) / len(pairs)
        label = f"{name:28s} {each:6.0f} ms"
        table |= evaluate({label: lambda p: pictures[p.name].to(p.hq)}, pairs, lpips)
    table |= evaluate({f"{'bicubic':38s}": lambda p: upsample(p.lq, run.cfg.scale)},
                      pairs, lpips)
    print_table(table, lpips.name)
    return table


def draw_chain(pair, cfg, file):
    """The lecture's figure, without training: schedules, and x_t of one photo.

    Above: sqrt(eta_t) for several p.  Below: a row a kappa, from x_1 to x_T in pixel
    space, under the same noise (as in the paper's figure on kappa).
    """
    from matplotlib.figure import Figure
    kappas, powers, steps = (0.5, 2.0, 8.0), (0.3, 0.5, 1.0, 2.0), cfg.steps
    times = sorted({1 + round(i * (steps - 1) / 5) for i in range(6)})
    page = Figure(figsize=(12, 11), dpi=80, layout="constrained")
    top, bottom = page.subfigures(2, 1, height_ratios=(1, 1.7))
    axis = top.subplots()
    for p in powers:
        eta = ResidualShift(steps, power=p).eta[1:]
        axis.plot(range(1, steps + 1), eta.sqrt(), "o-", label=f"p = {p}")
    axis.set_xlabel("t", fontsize=14)
    axis.set_ylabel("sqrt(eta_t)", fontsize=14)
    axis.set_title(f"The shifting schedule, T = {steps}, kappa = 2", fontsize=16)
    axis.legend(fontsize=13)
    axes = bottom.subplots(len(kappas), len(times))
    x0, y0 = pair.hq.cpu(), upsample(pair.lq, cfg.scale).cpu()
    noise = noise_like(x0, torch.Generator().manual_seed(0))
    for row, kappa in zip(axes, kappas):
        chain = ResidualShift(steps, kappa, cfg.power)
        for axis, step in zip(row, times):
            axis.imshow(to_pil(chain.q_sample(x0, y0, torch.tensor([step]), noise)))
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"t = {step}", fontsize=13)
        row[0].set_ylabel(f"kappa = {kappa}", fontsize=14)
    bottom.suptitle(f"x_t between the photo and its degraded copy, p = {cfg.power}",
                    fontsize=16)
    write_file(file, lambda path: page.savefig(path, format="png"))


def mean_psnr(method, pairs):
    """Mean PSNR of method(pair) over held-out pairs, dB."""
    values = [psnr(to_unit(method(p)), to_unit(p.hq)) for p in pairs]
    return torch.cat(values).mean().item()


@torch.no_grad()
def mean_lpips(method, pairs, lpips):
    """Mean LPIPS of method(pair) over held-out pairs."""
    return torch.cat([lpips(method(p), p.hq) for p in pairs]).mean().item()


@torch.no_grad()
def sample(prior, end, lq, cfg, seed=0):
    """The whole chain: lq (1, 3, h, w) -> (1, 3, s h, s w) in [-1, 1], T steps."""
    x = upsample(lq, cfg.scale)
    y0 = end.encode(pad_to(x, end.factor))
    z = prior.chain.sample(prior, y0, torch.Generator().manual_seed(seed))
    return end.decode(z)[:, :, :x.shape[2], :x.shape[3]].clamp(-1, 1)


def pad_to(x, multiple):
    """x with its right and bottom edge repeated up to a multiple: (B, C, H', W')."""
    h, w = (-n % multiple for n in x.shape[2:])
    return F.pad(x, (0, w, 0, h), mode="replicate")


@torch.no_grad()
def evaluate(methods, pairs, lpips):
    """{method: {"psnr", "ssim", "lpips": mean, "each": [...], "pictures": [...]}}.

    methods: {name: function of a `Held` pair -> (1, 3, H, W) in [-1, 1]}.
    """
    table = {}
    for name, method in methods.items():
        pictures = [method(pair).float().clamp(-1, 1) for pair in pairs]
        each = [{"psnr": psnr(to_unit(y), to_unit(p.hq)).item(),
                 "ssim": ssim(to_unit(y), to_unit(p.hq)).item(),
                 "lpips": lpips(y, p.hq).item()} for y, p in zip(pictures, pairs)]
        mean = {k: sum(e[k] for e in each) / len(each) for k in each[0]}
        table[name] = {**mean, "each": each, "pictures": pictures}
    return table


def print_table(table, lpips_name):
    """One row a method: PSNR, SSIM, LPIPS, means over the held-out photos."""
    width = max(24, *map(len, table))
    head = "held-out photos, mean"
    print(f"\n{head:{width}s} {'PSNR':>7s} {'SSIM':>7s}  {lpips_name}")
    for name, row in table.items():
        print(f"{name:{width}s} {row['psnr']:7.2f} {row['ssim']:7.4f}  "
              f"{row['lpips']:.4f}")


# ---- 10. Command line (skim) ---------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is a `UserError`: one line instead of all flags."""

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def config_parser(description):
    """--tiny, --full, --run, and a flag for every number of `Config`."""
    parser = Parser(
        description=description.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--tiny", dest="preset", action="store_const", const="tiny",
                      default="small", help="the preset for a CPU, minutes")
    size.add_argument("--full", dest="preset", action="store_const", const="full",
                      help="the preset at Stable Diffusion's size")
    parser.add_argument("--run", help="folder of the run, runs/PRESET if left out")
    numbers = parser.add_argument_group("numbers (default < preset < flag)")
    for field in dataclasses.fields(Config):
        flag = "--" + field.name.replace("_", "-")
        kind = type(field.default)
        if kind is tuple:
            numbers.add_argument(flag, type=int, nargs="+", default=None)
        elif kind is bool:
            numbers.add_argument(flag, action=argparse.BooleanOptionalAction,
                                 default=None)
        else:
            numbers.add_argument(flag, type=kind, default=None)
    return parser


def given_numbers(args):
    """{name: value} of the `Config` flags on the command line."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config)
             if getattr(args, f.name) is not None}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def config_from(args):
    """The `Config` of parsed arguments: default < preset < VAE's file < flag."""
    cfg, given = preset(args.preset), given_numbers(args)
    if "vae_weights" in given:
        cfg = with_shapes_of(cfg, given["vae_weights"])
    return dataclasses.replace(cfg, **given)


def config_of(folder):
    """The `Config` that a run was trained with."""
    file = Path(folder) / "config.json"
    try:
        values = json.loads(file.read_text())
    except OSError:
        raise UserError(f"{folder}: no run here; train first") from None
    names = {f.name for f in dataclasses.fields(Config)}
    if values.keys() != names:
        raise UserError(f"{file}: another version's settings: "
                        f"{', '.join(sorted(values.keys() ^ names))}")
    return Config(**{k: tuple(v) if isinstance(v, list) else v
                     for k, v in values.items()})


def load_chapter_one(folder):
    """(cfg, end, prior) of a finished run."""
    cfg, folder = config_of(folder), Path(folder)
    end = build_end(cfg)
    if cfg.space == "latent":
        place(load_weights(end, folder / "vae.safetensors")).requires_grad_(False)
    prior = place(load_weights(ResShift(cfg), folder / "resshift.safetensors"))
    return cfg, end, prior.requires_grad_(False)


def print_config(cfg):
    """The settings of a run, once; config.json has them too."""
    text = ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(cfg).items() if v != "")
    print(textwrap.fill(f"settings: {text}", 100))


def check_output(path):
    """Refuse an output that cannot be written before the work is done."""
    if not Path(path).parent.is_dir():
        raise UserError(f"{path}: no such folder")
    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise UserError(f"{path}: not a picture format")


def save_picture(y, path, alpha=None):
    """Write (1, 3, H, W) in [-1, 1], with an alpha channel (Pillow's L) if given."""
    picture = to_pil(y)
    if alpha is not None and Path(path).suffix.lower() not in (".jpg", ".jpeg"):
        picture.putalpha(alpha.resize(picture.size, Image.BICUBIC))
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot write this picture ({error})") from None


def join_processes():
    """Under torchrun: meet the other processes (NCCL, or gloo without a GPU).

    Every process trains on its share of each batch; rank 0 alone speaks and writes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
        if world()[0] > 0:
            sys.stdout = open(os.devnull, "w")


def command_line(main):
    """Run main(); a `UserError` is one line on stderr and exit code 2."""
    try:
        join_processes()
        code = main()
        if world()[1] > 1:
            torch.distributed.destroy_process_group()
        sys.exit(code)
    except (UserError, OSError, FloatingPointError) as error:  # OSError: a full disk
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def main():
    """python resshift.py: train and evaluate chapter 1, or restore one picture."""
    parser = config_parser(__doc__)
    parser.add_argument("--train", action="store_true", help="train and evaluate")
    parser.add_argument("--compare", action="store_true",
                        help="train a prior a row of COMPARED; one table")
    parser.add_argument("--figure", action="store_true",
                        help="draw schedules and chain to runs/chain.png; no training")
    parser.add_argument("--input", help="a picture to restore")
    parser.add_argument("--output", default="up.png", help="where to write it")
    args = parser.parse_args()
    folder = args.run or f"runs/{args.preset}" + ("-compare" if args.compare else "")
    if args.input:
        check_output(args.output)
        cfg, end, prior = load_chapter_one(folder)
        lq = read_picture(args.input).to(device())
        save_picture(sample(prior, end, lq, cfg), args.output)
        return 0
    if not (args.train or args.figure or args.compare):
        parser.error("nothing to do: --train, --compare, --figure, or --input")
    cfg = config_from(args)
    check_config(cfg)
    if args.figure:
        Path("runs").mkdir(exist_ok=True)
        draw_chain(held_out(cfg)[-2], cfg, "runs/chain.png")
        print("runs/chain.png")
        return 0
    pairs, run = held_out(cfg), Run(folder, cfg)
    perceptual = Perceptual(cfg.lpips_net).to(device())
    if args.compare:
        compare(run, pairs, perceptual)
        return 0
    print_config(cfg)
    end, prior = chapter_one(run, Pool(cfg), pairs)
    methods = {"bicubic": lambda p: upsample(p.lq, cfg.scale),
               "ResShift": lambda p: sample(prior, end, p.lq, cfg)}
    print_table(evaluate(methods, pairs, perceptual), perceptual.name)
    return 0


if __name__ == "__main__":
    command_line(main)
