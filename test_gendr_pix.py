"""Tests of resshift.py and gendr_pix.py, in the order of the files.

Every test compares with an oracle: a closed form, Bayes' rule, another implementation,
or a case worked by hand.  No GPU, no downloads:  python -m pytest -q
"""
import ast
import dataclasses
import json
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses import FakeTensorMode

import gendr_pix as g
import resshift as r

os.environ["CUDA_VISIBLE_DEVICES"] = ""                   # the tests are the CPU's
HERE = Path(__file__).parent
MICRO = dataclasses.replace(
    r.preset("tiny"), crop=32, pool=4, batch=4, steps=4, distill_t=3, ranges="mild",
    unet_widths=(16, 32), head_width=16, groups=8, context_tokens=2, context_width=8,
    vae_widths=(8, 8, 8, 16), vae_groups=4, vae_crop=32, lora_rank=4,
    estimator_width=4, save_every=2, log_every=100, warmup=1, seed=3)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def in_project(monkeypatch):
    monkeypatch.chdir(HERE)


def close(a, b, tolerance=1e-6):
    """assert_close with one tolerance, absolute and relative."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- resshift.py, 1: numbers ---------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "small", "full"])
def test_presets_hold_every_part(name):
    cfg = r.preset(name)
    assert len(cfg.unet_widths) >= 2 and cfg.context_tokens > 0 and cfg.lora_rank > 0
    assert min(cfg.lambda_adv, cfg.lambda_lpips, cfg.lambda_fourier, cfg.negative) > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.crop = 1


# ---- resshift.py, 2: the chain -------------------------------------------------------


@pytest.mark.parametrize("steps, kappa, power", [(15, 2.0, 0.3), (4, 0.5, 1.0)])
def test_composed_steps_have_the_marginals_mean_and_variance(steps, kappa, power):
    chain = r.ResidualShift(steps, kappa, power)
    x0, y0 = randn(2, 3, 4, 4, seed=1), randn(2, 3, 4, 4, seed=2)
    zero, one = torch.zeros_like(x0), torch.ones_like(x0)
    x, variance = x0, 0.0
    for step in range(1, steps + 1):
        t = torch.full((2,), step)
        mean = chain.q_step(x, x0, y0, t, zero)
        variance = variance + (chain.q_step(x, x0, y0, t, one) - mean) ** 2
        x = mean
        close(x, chain.q_sample(x0, y0, t, zero), 1e-5)
        close(variance, (chain.q_sample(x0, y0, t, one) - x) ** 2, 1e-4)


def test_posterior_is_bayes_rule_on_two_gaussians():
    chain = r.ResidualShift(6, 1.5, 0.5)
    x0, y0, x_t = (randn(1, 1, 2, 2, seed=s).double() for s in (1, 2, 3))
    for step in range(2, 7):
        t = torch.tensor([step])
        eta, alpha = chain.eta.double(), chain.alpha.double()
        prior_mean = x0 + eta[step - 1] * (y0 - x0)
        prior_var, step_var = 1.5 ** 2 * eta[step - 1], 1.5 ** 2 * alpha[step]
        seen = x_t - alpha[step] * (y0 - x0)         # x_t = x_(t-1) + alpha e0 + noise
        var = 1 / (1 / prior_var + 1 / step_var)
        mean = var * (prior_mean / prior_var + seen / step_var)
        got_mean, got_var = chain.posterior(x_t, x0, t)
        close(got_mean, mean, 1e-5)
        close(got_var.double(), var.view(1, 1, 1, 1), 1e-5)


def test_schedule_rises_between_its_ends():
    chain = r.ResidualShift(15, 2.0, 0.3)
    assert chain.eta.shape == chain.alpha.shape == (16,) and chain.eta[0] == 0
    assert (chain.eta[1:] > chain.eta[:-1]).all()
    close(chain.eta[1], torch.tensor(0.02 ** 2))
    close(chain.eta[15], torch.tensor(0.999))
    close(chain.alpha.cumsum(0), chain.eta, 1e-6)
    close(r.ResidualShift(15, 0.5).eta[1], torch.tensor(0.001))     # the cap


def test_schedule_of_the_released_four_step_model():
    chain = r.ResidualShift(4, 2.0, 0.3, eta_1=0.1 ** 2, eta_T=0.99 ** 2)
    close(chain.eta[1:].sqrt(), torch.tensor([0.1, 0.520096, 0.761382, 0.99]), 1e-6)
    x = torch.zeros(4, 1, 1, 1)
    variance = chain.posterior(x, x, torch.arange(1, 5))[1].flatten()
    close(variance, torch.tensor([0.0, 0.038521, 0.577119, 0.947297]), 2e-6)


def test_last_step_is_the_prediction_itself():
    chain, x_t, x0 = r.ResidualShift(), randn(1, 1, 2, 2), randn(1, 1, 2, 2, seed=1)
    mean, variance = chain.posterior(x_t, x0, torch.tensor([1]))
    assert variance.item() == 0
    close(mean, x0, 1e-6)


def test_sampling_with_the_true_x0_returns_it_and_repeats_under_a_generator():
    chain, x0, y0 = r.ResidualShift(), randn(2, 1, 4, 4), randn(2, 1, 4, 4, seed=1)
    close(chain.sample(lambda x, y, t: x0, y0, rng(5)), x0, 1e-6)
    a, b, c = (chain.sample(lambda x, y, t: 0.5 * x, y0, rng(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_many_steps_approach_the_continuous_chain():
    # As T grows, eta(s) for s = (t-1)/(T-1) tends to eta_1 (eta_T / eta_1)^(s^p), and
    # the posterior's variance to kappa^2 alpha: the noise of one small step.
    chain = r.ResidualShift(2001, 2.0, 0.5, eta_1=0.001, eta_T=0.999)
    s = torch.linspace(0, 1, 2001)
    close(chain.eta[1:], 0.001 * 999 ** s.sqrt(), 1e-4)
    t, x = torch.arange(1001, 2002), torch.zeros(1001, 1, 1, 1)
    ratio = chain.posterior(x, x, t)[1].flatten() / (4 * chain.alpha[1001:])
    close(ratio, torch.ones(1001), 5e-3)


def test_prior_sample_has_the_marginals_spread():
    chain, y0 = r.ResidualShift(15, 2.0), torch.zeros(1, 1, 200, 200)
    x = chain.prior_sample(y0, randn(1, 1, 200, 200))
    assert abs(x.std().item() - 2 * math.sqrt(0.999)) < 0.03


def test_input_scale_gives_unit_variance():
    chain = r.ResidualShift(15, 2.0)
    for step in (1, 8, 15):
        x0, noise = randn(1, 1, 300, 300, seed=1), randn(1, 1, 300, 300, seed=2)
        t = torch.tensor([step])
        x_t = chain.q_sample(x0, x0, t, noise) * chain.input_scale(chain.eta[step])
        assert abs(x_t.std().item() - 1) < 0.01


def test_bad_schedules_are_refused():
    for bad in (dict(steps=1), dict(eta_1=0.5, eta_T=0.4), dict(eta_T=1.5)):
        with pytest.raises(ValueError):
            r.ResidualShift(**bad)


# ---- chapter 0: the exact world, an oracle for both files ----------------------------


def log_density(world, x_t, y0, gain, shift, variance):
    """log p(x_t, y0's mean), where x_t ~ N(gain x0 + shift, variance), term by term."""
    c, s2, n2 = world.centres, torch.tensor(world.STD ** 2), world.NOISE[0] ** 2
    detail = torch.distributions.Normal(gain * c[:, 1] + shift[:, 1:],
                                        (gain ** 2 * s2 + variance).sqrt())
    cov = torch.stack([gain ** 2 * s2 + variance, gain * s2, gain * s2, s2 + n2])
    joint = torch.distributions.MultivariateNormal(torch.zeros(2), cov.view(2, 2))
    both = torch.stack([(x_t - shift)[:, :1] - gain * c[:, 0], y0[:, :1] - c[:, 0]], -1)
    return torch.logsumexp(detail.log_prob(x_t[:, 1:]) + joint.log_prob(both), 1)


def test_exact_denoiser_is_the_score_and_vsd_the_difference_of_scores():
    """Tweedie: score = ((1 - eta) f + eta y0 - x_t) / (kappa^2 eta), by autograd."""
    world, chain, t = r.ExactWorld(), r.ResidualShift(15), 6
    eta, k2 = chain.eta[t], chain.kappa ** 2
    x0, y0 = world.draw(64, rng())
    x_t = chain.q_sample(x0, y0, torch.tensor([t]), randn(64, 2, 1, 1))
    flat, y = x_t.flatten(1).clone().requires_grad_(True), y0.flatten(1)
    density = log_density(world, flat, y, 1 - eta, eta * y, k2 * eta)
    score, = torch.autograd.grad(density.sum(), flat)
    real = world.denoise(y0, chain, x_t, torch.tensor([t]))
    close(((1 - eta) * real + eta * y0 - x_t).flatten(1) / (k2 * eta), score, 1e-3)
    # A generator with one output has q(z_t | y0) = N(z_g + eta (y0 - z_g), k2 eta).
    z_g = (x0 + 0.1).requires_grad_(True)
    own = (z_g + eta * (y0 - z_g) - x_t).detach().flatten(1) / (k2 * eta)
    g.vsd_loss(z_g, real, z_g, 1.0).backward()
    close(z_g.grad.flatten(1) * z_g.numel(), (own - score) * k2 * eta / (1 - eta), 1e-3)
    away = x0.clone().requires_grad_(True)                   # psi = z_g, not held fixed
    g.cid_loss(y0, real, real, away, 1.0).backward()
    close(away.grad * away.numel(), real + y0 - 2 * x0, 1e-5)
    still = x0.clone().requires_grad_(True)
    g.vsd_loss(still, real, real, 1.0).backward()            # the two scores agree
    assert not still.grad.any()


@pytest.mark.parametrize("chain", [r.ResidualShift(15), r.FromNoise(15)])
def test_exact_denoiser_is_an_average_over_weighted_draws(chain):
    world, t = r.ExactWorld(), torch.tensor([7])
    x0, y0 = world.draw(1, rng(3))
    x_t = chain.q_sample(x0, y0, t, randn(1, 2, 1, 1, seed=4))
    many = world.draw(400_000, rng(5))[0]
    zero, one = torch.zeros_like(x_t), torch.ones_like(x_t)
    std = chain.q_sample(zero, zero, t, one)
    misfit = ((x_t - chain.q_sample(many, y0, t, 0 * many)) / std).square().sum(1)
    misfit = misfit + ((y0 - many)[:, :1] / 0.3).square().sum(1)
    weight = torch.softmax(-misfit.flatten() / 2, 0)
    close((weight @ many.flatten(1)), world.denoise(y0, chain, x_t, t).flatten(), 2e-2)


@pytest.mark.parametrize("chain", [r.ResidualShift, r.FromNoise])
def test_sampling_converges_to_the_posterior_of_one_gaussian(chain):
    world = r.ExactWorld()
    world.centres, world.STD = torch.tensor([[0.3, -0.5]]), 0.5
    y0 = torch.tensor([0.8, 0.0])[:, None, None].expand(20_000, -1, -1, -1)
    y0, errors = y0.reshape(-1, 2, 1, 1)[:20_000], []
    precision = torch.tensor([1 / 0.25 + 1 / 0.09, 1 / 0.25])
    mean = torch.tensor([0.3 / 0.25 + 0.8 / 0.09, -0.5 / 0.25]) / precision
    for steps in (20, 400):
        c = chain(steps)
        x = c.sample(lambda x, y, t: world.denoise(y, c, x, t), y0, rng()).flatten(1)
        cov = torch.cov(x.T)
        errors.append((cov - torch.diag(1 / precision)).abs().max().item())
        close(x.mean(0), mean, 0.03)
    assert errors[1] < 0.02 and errors[1] < 0.5 * errors[0]


def test_chapter_0_prints_its_claims_and_draws(tmp_path):
    done = command(HERE / "resshift.py", "--exact", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {name.strip(): [float(v.split("+-")[0]) for v in values] for name, *values in
            (line.strip("| ").split("|") for line in done.stdout.splitlines()
             if "+-" in line)}
    (mean, far, _), (faithful, near, energy) = (rows[k] for k in (
        "the exact mean", "ResShift, T = 15"))
    assert 1.7 < faithful / mean < 2.1 and near < 0.3 * far
    assert rows["ResShift, T = 8"][1] < rows["from noise, T = 15"][1]    # half of T
    assert rows["ResShift, T = 4"][1] < rows["from noise, T = 8"][1]
    assert rows["kappa = 32"][0] < faithful and rows["kappa = 32"][1] > near
    assert rows["p = 0.1"][0] < faithful and rows["p = 0.1"][1] > near
    assert np.array(Image.open(tmp_path / "exact.png").convert("RGB")).std() > 20


def test_one_step_in_the_exact_world():
    world = r.ExactWorld()
    x0, y0 = world.draw(1000, rng(9))
    found = {}
    for name in ("regression", "4 VSD, t <= 5", "VSD, t > 5", "CiD alone, t <= 5"):
        (points,), _ = g.exact_generator(name, world, y0, rng(0), steps=200)
        found[name] = r.exact_measures(world, points, x0, y0)
    mean, vsd, large, cid = found.values()
    assert vsd["distance"] < 0.75 * mean["distance"] and vsd["mse"] < 1.4 * mean["mse"]
    assert all(abs(m["distance"] / mean["distance"] - 1) < 0.1 for m in (large, cid))


# ---- resshift.py, 3 and 4: the networks ----------------------------------------------


def wake(module):
    """Give every parameter random values: the zero starts would hide errors."""
    for i, p in enumerate(module.parameters()):
        nn.init.normal_(p, std=0.1, generator=rng(i))
    return module


def test_unet_and_vae_equal_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    cfg = dataclasses.replace(MICRO, unet_widths=(16, 32, 32, 32), unet_blocks=2,
                              vae_blocks=2, vae_skip=False, shortcut=False)
    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    theirs = wake(diffusers.UNet2DConditionModel(
        in_channels=5, out_channels=6, block_out_channels=cfg.unet_widths,
        norm_num_groups=cfg.groups, cross_attention_dim=cfg.context_width,
        attention_head_dim=tuple(w // cfg.head_width for w in cfg.unet_widths),
        use_linear_projection=True, down_block_types=down,
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)).eval()
    ours = r.UNet(cfg, 5, 6)
    ours.load_state_dict(theirs.state_dict())
    x, context = randn(2, 5, 16, 24), randn(2, 7, cfg.context_width)
    t = torch.tensor([7, 999])
    with torch.no_grad():
        close(ours(x, t, context), theirs(x, t, context).sample, 1e-5)
    theirs = wake(diffusers.AutoencoderKL(
        latent_channels=16, block_out_channels=cfg.vae_widths, layers_per_block=2,
        norm_num_groups=cfg.vae_groups, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4)).eval()
    ours = r.VAE(cfg)
    ours.load_state_dict(theirs.state_dict() | {"scale": torch.ones(())})
    x = randn(1, 3, 32, 40)
    with torch.no_grad():
        z = ours.encode(x)
        close(z, theirs.encode(x).latent_dist.mean, 1e-5)
        close(ours.decode(z), theirs.decode(z).sample, 1e-5)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_full_size_has_the_papers_parameter_counts():
    cfg = r.preset("full")
    with torch.device("meta"):
        unet, vae = r.UNet(cfg, 192, 192), r.VAE(cfg)
        base = r.UNet(cfg, 4, 4)
        lora = g.DegradationLoRA(base, cfg.lora_rank)
    assert round(count(unet) / 1e6, 2) == 866.99
    assert count(vae) == 57_266_643
    assert len(lora.block_of) == 257 and max(lora.block_of.values()) == 9
    added = sum(p.numel() for n, p in base.named_parameters()
                if ".A." in n or ".B." in n)
    assert added == 32_434_304


def test_full_size_trains_as_many_parameters_as_s3diff():
    cfg = dataclasses.replace(r.preset("full"), latent_channels=4,     # SD's own VAE
                              vae_widths=(128, 256, 512, 512))
    with torch.device("meta"):
        prior, vae = (m.requires_grad_(False) for m in (r.ResShift(cfg), r.VAE(cfg)))
        gendr = g.gendr_from_prior(prior, vae, cfg)
    gendr.prompts.requires_grad_(False)              # S3Diff's prompts are not learned
    trained = sum(p.numel() for p in gendr.parameters() if p.requires_grad)
    print(trained)
    assert round(trained / 1e6, 1) == 34.5


def test_full_size_has_the_papers_multiply_accumulates():
    rows = g.counts(r.preset("full"), 512)
    pix, gendr = rows["GenDR-Pix"], rows["GenDR"]
    assert round(pix["one"], 1) == 343.5                 # the paper: 344 and 744
    assert round(pix["two"], 1) == 743.3
    assert round(gendr["one"]) == 1284 and round(gendr["two"]) == 1624
    prompts = 2 * 77 * 1024 / 1e6                        # learned, beside the U-Net
    assert round(pix["parameters"] - prompts, 2) == 866.99


def test_multiply_accumulates_and_parameters_by_hand():
    class Attend(nn.Conv2d):
        def forward(self, x):
            q = super().forward(x).flatten(2).mT[:, None]    # (1, 1, 256, 3)
            return F.scaled_dot_product_attention(q, q, q)[:, 0].mT.reshape(x.shape)

    class Restorer(nn.Module):
        def __init__(self):
            super().__init__()
            self.end, self.spare = Attend(3, 3, 1), nn.Linear(9, 9)
            self.unet, self.shortcut = Attend(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.unet(self.end(x)) + self.shortcut(x)
    with torch.device("meta"):
        every, step, parameters = g.count_pass(Restorer(), 16)
    n, products = 256, 2 * 256 ** 2 * 3
    assert every * 1e9 == pytest.approx(9 * n + products + 81 * n + 9 * n)
    assert step * 1e9 == pytest.approx(81 * n + 9 * n)
    assert parameters * 1e6 == pytest.approx(9 + 81 + 9 + 3 * 3)


def diffusers_unet(cfg, channels):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    return wake(diffusers.UNet2DConditionModel(
        in_channels=channels, out_channels=channels, block_out_channels=cfg.unet_widths,
        norm_num_groups=cfg.groups, cross_attention_dim=cfg.context_width,
        layers_per_block=cfg.unet_blocks, use_linear_projection=True,
        attention_head_dim=tuple(w // cfg.head_width for w in cfg.unet_widths),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))).eval()


def test_stable_diffusion_weights_start_the_prior(tmp_path, in_project):
    """All but conv_in and conv_out, from a file under diffusers' names."""
    file = tmp_path / "unet.safetensors"
    cfg = dataclasses.replace(MICRO, shortcut=False, unet_weights=str(file),
                              prior_steps=0, space="pixel")
    theirs = diffusers_unet(cfg, 4).state_dict()
    r.save_weights(theirs, file)
    pairs = r.Pairs(cfg)
    pairs.fill()
    r.chapter_end(run := r.Run(tmp_path / "run", cfg), pairs)
    ours = r.chapter_prior(run, pairs).unet.state_dict()
    assert ours.keys() == theirs.keys()
    for k, v in ours.items():
        assert k.startswith(("conv_in.", "conv_out.")) or torch.equal(v, theirs[k])
    theirs["mid_block.resnets.0.conv1.weight"] = torch.zeros(1)
    save_file(theirs, file)
    with pytest.raises(r.UserError, match="mid_block.resnets.0.conv1.weight is"):
        r.chapter_prior(r.Run(tmp_path / "bad", cfg), pairs)


def test_an_autoencoders_file_gives_the_vae(tmp_path, in_project):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    theirs = wake(diffusers.AutoencoderKL(
        latent_channels=12, block_out_channels=(8, 8, 12, 16), layers_per_block=2,
        norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4)).eval()
    file, state = tmp_path / "vae.safetensors", theirs.state_dict()
    save_file(state, file)
    cfg = dataclasses.replace(MICRO, vae_weights=str(file), vae_widths=(8, 8, 12, 16),
                              vae_blocks=2, vae_skip=False, latent_channels=12)
    pairs = r.Pairs(cfg)
    pairs.fill()
    vae, hq = r.chapter_end(r.Run(tmp_path / "run", cfg), pairs), pairs.some(4).hq
    with torch.no_grad():
        z = theirs.encode(hq).latent_dist.mean
        close(vae.encode(hq), z / z.std(), 1e-4)
        close(vae.decode(vae.encode(hq)), theirs.decode(z).sample, 1e-4)
    del state["decoder.conv_out.bias"]
    save_file(state, file)
    with pytest.raises(r.UserError, match="decoder.conv_out.bias is not there"):
        r.chapter_end(r.Run(tmp_path / "bad", cfg), pairs)


def test_unet_takes_odd_sizes_and_hears_time_and_prompt():
    unet = wake(r.UNet(MICRO, 3, 3))
    x, context = randn(1, 3, 9, 7), randn(1, 2, 8)
    a = unet(x, torch.tensor([3]), context)
    assert a.shape == x.shape
    assert not torch.allclose(a, unet(x, torch.tensor([900]), context), atol=1e-4)
    assert not torch.allclose(a, unet(x, torch.tensor([3]), -context), atol=1e-4)


def test_pixel_shuffle_is_the_identity_and_torchs():
    x, end = randn(2, 3, 16, 24), r.PixelShuffle(8)
    z = end.encode(x)
    assert z.shape == (2, 192, 2, 3) and end.channels == 192
    assert torch.equal(end.decode(z), x)
    assert torch.equal(z, nn.PixelUnshuffle(8)(x))


def test_pairs_travel_to_a_worker_without_networks(in_project):
    pairs = r.Pairs(MICRO)
    pairs.add("z_hq", lambda batch: batch.hq)
    far = pickle.loads(pickle.dumps(pairs))
    assert torch.equal(far[7]["lq"], pairs[7]["lq"]) and "teachers" not in vars(far)


def test_held_out_pictures_have_groups_and_several_degradations(in_project):
    cfg = dataclasses.replace(MICRO, val_data="tiny_data/val", val_draws=2)
    held, again = r.held_out(cfg), r.held_out(dataclasses.replace(cfg, seed=9))
    files = list(Path("tiny_data/val").rglob("*.png"))
    assert len(held) == 2 * len(files) and {p.group for p in held} == {
        "same_source", "other"}
    assert torch.equal(held[0].hq, held[1].hq)
    assert not torch.equal(held[0].lq, held[1].lq)
    assert all(torch.equal(p.lq, q.lq) for p, q in zip(held, again))


def test_the_linear_start_passes_what_is_linear_and_keeps_colours():
    vae = r.VAE(MICRO)
    flat = randn(16, 3, 1, 1).clamp(-1, 1).expand(-1, -1, 32, 32).contiguous()  # rank 3
    vae.start_linear(flat)
    z = vae.encode(flat)
    assert z.shape == (16, 16, 4, 4) and torch.equal(z, vae.encode(flat))
    close(vae.decode(z)[..., 8:-8, 8:-8], flat[..., 8:-8, 8:-8], 2e-2)


# ---- resshift.py, 5: the degradation -------------------------------------------------


def photo(n=64):
    picture = r.open_picture(HERE / "tiny_data/val/other/cat.png")
    return r.from_pil(picture)[:, :, :n, :n]


def test_degradation_repeats_under_its_generator():
    (a, sa), (b, sb), (c, _) = (r.degrade(photo(), MICRO, rng(s)) for s in (1, 1, 2))
    assert a.shape == (1, 3, 16, 16) and sa.shape == (1, 2)
    assert torch.equal(a, b) and torch.equal(sa, sb) and not torch.equal(a, c)
    levels = (a + 1) * 127.5
    close(levels, levels.round(), 1e-4)                             # 8-bit levels


def mean_scores(monkeypatch, **ranges):
    base = vars(r.RANGES["mild"]) | ranges
    monkeypatch.setitem(r.RANGES, "mild", r.SimpleNamespace(**base))
    scores = [r.degrade(photo(), MICRO, rng(s))[1] for s in range(12)]
    return torch.cat(scores).mean(0)


def test_scores_rise_with_blur_and_with_noise(monkeypatch):
    sharp = mean_scores(monkeypatch, sigma=((0.2, 0.3), (0.2, 0.3)))
    blurred = mean_scores(monkeypatch, sigma=((4.0, 5.0), (2.0, 3.0)))
    assert blurred[0] > sharp[0] + 0.1
    noise = dict(sigma=((0.2, 1.5), (0.2, 1.0)))
    quiet = mean_scores(monkeypatch, gaussian=((1, 2), (1, 2)),
                        poisson=((0.05, 0.1), (0.05, 0.1)), **noise)
    loud = mean_scores(monkeypatch, gaussian=((25, 30), (20, 25)),
                       poisson=((2.5, 3.0), (2.0, 2.5)), **noise)
    assert loud[1] > quiet[1] + 0.1


def test_degradation_does_not_shift_the_picture():
    n = torch.arange(64) - 31.5
    bump = torch.exp(-(n[:, None] ** 2 + n ** 2) / 200).expand(1, 3, 64, 64)
    at = torch.arange(16) - 7.5
    for seed in range(20):
        lq = r.to_unit(r.degrade(2 * bump - 1, MICRO, rng(seed))[0])[0].mean(0)
        weight = (lq - 0.3).clamp(min=0)                 # noise stays below
        weight = weight / weight.sum()
        assert abs((weight.sum(0) * at).sum()) < 0.25    # LQ pixels
        assert abs((weight.sum(1) * at).sum()) < 0.25


def test_kernels_sum_to_one_and_gaussian_has_its_variance():
    k = r.gaussian_kernel(21, 1.5)
    x2 = (torch.arange(21) - 10).float() ** 2
    close(k.sum(), torch.tensor(1.0), 1e-5)
    close((k.sum(0) * x2).sum(), torch.tensor(1.5 ** 2), 1e-3)
    k, variance = r.sinc_kernel(21, math.pi / 2)
    assert math.exp(-variance * (math.pi / 2) ** 2 / 2) == pytest.approx(0.5)
    close(k.sum(), torch.tensor(1.0), 1e-5)
    response = torch.fft.fft2(k, s=(64, 64)).abs()
    assert response[0, 2] > 0.9 and response[0, 28] < 0.1           # passes low only


# ---- resshift.py, 6: pictures and metrics --------------------------------------------


def test_psnr_and_ssim_by_hand():
    a, b = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), 0.6)
    close(r.psnr(a, b), torch.tensor([20 * math.log10(255 / 21.9)]).double(), 1e-5)
    ya, yb, c1 = 16 + 110.0, 16 + 131.0, 2.55 ** 2    # round(109.5) = 110, 131.4 -> 131
    expected = (2 * ya * yb + c1) / (ya ** 2 + yb ** 2 + c1)
    close(r.ssim(a, b), torch.tensor([expected]).double(), 1e-3)
    close(r.ssim(a, a), torch.ones(1).double())


def test_ssim_of_one_window_in_numpy():
    a, b = (torch.rand(1, 3, 11, 11, generator=rng(s)) for s in (1, 2))
    b = (a + 0.2 * b).clamp(0, 1)
    to_y = [65.481, 128.553, 24.966]
    y = [np.round(16 + np.tensordot(to_y, x[0].double().numpy(), 1)) for x in (a, b)]
    d = np.arange(11) - 5
    w = np.exp(-d ** 2 / (2 * 1.5 ** 2))
    w = np.outer(w, w) / w.sum() ** 2
    ma, mb = (w * y[0]).sum(), (w * y[1]).sum()
    va, vb = (w * (y[0] - ma) ** 2).sum(), (w * (y[1] - mb) ** 2).sum()
    cov = (w * (y[0] - ma) * (y[1] - mb)).sum()
    c1, c2 = 2.55 ** 2, 7.65 ** 2
    expected = ((2 * ma * mb + c1) / (ma ** 2 + mb ** 2 + c1)
                * (2 * cov + c2) / (va + vb + c2))
    assert abs(r.ssim(a, b).item() - expected) < 1e-6


def noise_picture(n, std, seed):
    """Grey white noise of `std` grey levels around 128: (1, 3, n, n) in [-1, 1]."""
    grey = 127.5 + std * torch.randn(n, n, generator=rng(seed)).double()
    return r.from_bytes(grey).double().expand(1, 3, n, n)


def test_spectral_distance_of_filtered_noise_is_the_filters_response():
    # A 3-tap binomial along x: |H|^2 = cos^4(pi u), the same noise on both sides.
    hq = noise_picture(256, 10.0, 0)
    y = (hq.roll(1, 3) + 2 * hq + hq.roll(-1, 3)) / 4
    v, u = torch.fft.fftfreq(256)[:, None].double(), torch.fft.fftfreq(256).double()
    level = 40 * (math.pi * u).cos().abs().clamp(min=1e-2).log10() + 0 * v
    ring = ((v ** 2 + u ** 2).sqrt() * 62).long()
    expected = torch.stack([level[ring == k].mean() for k in range(31)]).abs().mean()
    assert r.spectral_distance(y, hq).item() == pytest.approx(expected.item(), abs=0.3)
    assert r.spectral_distance(hq, hq).item() == 0
    louder = noise_picture(256, 20.0, 1)                     # twice the noise: +6 dB
    assert r.spectral_distance(louder, hq).item() == pytest.approx(
        20 * math.log10(2), abs=0.3)


def test_lattice_of_chance_and_of_a_known_pattern():
    # One period-8 impulse of A grey levels has |FFT|^2 / (H W) = (A / 64)^2 H W at each
    # of the 63 points; noise of std s, and rounding to 8 bits, s^2 + 1/12 beside it.
    chance = torch.stack([r.lattice_peak(noise_picture(128, 4.0, s))
                          for s in range(40)])
    assert chance.mean().item() == pytest.approx(-2.5, abs=0.4)      # E 10 log10 Exp(1)
    a, s, n = 32.0, 2.0, 128
    pattern = torch.zeros(n, n).double()
    pattern[3::8, 5::8] = a
    y = noise_picture(n, s, 3) + pattern / 127.5
    peak, amplitude = r.lattice_peak(y), r.lattice_amplitude(y)
    expected = 10 * math.log10((a / 64) ** 2 * n * n / (s ** 2 + 1 / 12))
    assert peak.item() == pytest.approx(expected, abs=0.6)
    assert amplitude.item() == pytest.approx(math.sqrt(63) * a / 64, rel=0.05)


def test_bytes_and_floats_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(r.to_bytes(r.from_bytes(levels)), levels)


def test_pictures_open_as_a_viewer_shows_them(tmp_path):
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    colour = np.stack([ramp, ramp[::-1], ramp.T], 2)
    palette = Image.fromarray(colour).convert("P", palette=Image.ADAPTIVE)
    palette.save(tmp_path / "p.png")
    Image.fromarray(np.dstack([colour, ramp])).save(tmp_path / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6                                       # turn 90 degrees clockwise
    Image.fromarray(colour[:4]).save(tmp_path / "turned.png", exif=exif)
    grey = (read_picture(tmp_path / "grey.png") + 1) * 127.5
    close(grey[0, 0], torch.from_numpy(ramp).float(), 1e-4)
    assert torch.equal(read_picture(tmp_path / "deep.png"),
                       read_picture(tmp_path / "grey.png"))
    assert read_picture(tmp_path / "p.png").shape == (1, 3, 8, 8)
    assert r.open_picture(tmp_path / "alpha.png").mode == "RGBA"
    assert r.open_picture(tmp_path / "turned.png").size == (4, 8)
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    for name in ("bad.png", "missing.png"):
        with pytest.raises(r.UserError, match=name):
            read_picture(tmp_path / name)


def test_upsampling_keeps_the_centre_and_equals_pillows():
    x = torch.rand(1, 1, 8, 8, generator=rng()) * 2 - 1
    theirs = Image.fromarray(x[0, 0].numpy()).resize((32, 32), Image.BICUBIC)
    ours = r.upsample(x.expand(-1, 3, -1, -1), 4)
    close(ours[0, 1], torch.from_numpy(np.array(theirs)).clamp(-1, 1), 1e-5)
    symmetric = x + x.flip(2, 3)
    up = r.upsample(symmetric.expand(-1, 3, -1, -1) / 2, 4)
    close(up, up.flip(2, 3), 1e-5)                                  # no sub-pixel shift


def read_picture(path):
    return r.from_pil(r.open_picture(path))


def no_backbone(monkeypatch):
    real = lpips.LPIPS

    def offline(*args, **kwargs):
        if not kwargs.get("pnet_rand"):
            raise OSError("no network")
        return real(*args, **kwargs)
    monkeypatch.setattr(lpips, "LPIPS", offline)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_nothing_foreign_is_unpickled(tmp_path, monkeypatch, in_project):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    for file in (tmp_path / "checkpoints" / r.Perceptual.FILES["alex"],
                 tmp_path / "x.ckpt", tmp_path / "x.safetensors"):
        torch.save({"step": Payload()}, file)
    with pytest.raises(r.UserError, match="not torchvision's"):
        r.Perceptual("alex")
    with pytest.raises(r.UserError, match="not a weights file"):
        r.load_weights({}, tmp_path / "x.safetensors")
    with pytest.raises(r.UserError, match="not a checkpoint"):
        r.resume(r.SimpleNamespace(folder=tmp_path), "x", (), ())
    assert not (tmp_path / "ran").exists()


def test_lpips_without_its_backbone_says_so_and_repeats(monkeypatch, capsys):
    no_backbone(monkeypatch)
    state = torch.get_rng_state()
    a, b = r.Perceptual("alex"), r.Perceptual("alex")
    assert torch.equal(state, torch.get_rng_state())
    assert a.name == "LPIPS (random features)" and "alexnet" in capsys.readouterr().out
    x, y = randn(1, 3, 64, 64).clamp(-1, 1), randn(1, 3, 64, 64, seed=1).clamp(-1, 1)
    assert a(x, x).item() == 0 and a(x, y).item() > 0
    assert torch.equal(a(x, y), b(x, y))


# ---- resshift.py, 7 and 8: pairs and the training loop -------------------------------


def world(tmp_path, cfg=MICRO, frozen=True):
    """A run, its pool of pairs, and an untrained but awake end and prior."""
    run, pairs = r.Run(tmp_path / "run", cfg), r.Pairs(cfg)
    pairs.fill()
    vae, prior = r.VAE(cfg), r.ResShift(cfg)
    vae.start_linear(pairs.some(4).hq)
    vae.requires_grad_(False)
    prior.requires_grad_(not frozen)
    pairs.add("z_hq", lambda batch: vae.encode(batch.hq))
    pairs.add("z_lq", lambda batch: vae.encode(batch.lq_up))
    pairs.add("estimate", lambda batch: batch.scores)
    return run, pairs, vae, prior


def first_and_last(run, stage, name):
    rows = [line.split(",") for line in
            (run.folder / "log.csv").read_text().splitlines()[1:]]
    values = [float(v) for s, _, k, v in rows if s == stage and k == name]
    return values[0], values[-1]


@pytest.mark.parametrize("stage, loss, steps, factor", [
    ("vae", "mse", 60, 0.9), ("resshift", "mse", 60, 0.7),
    ("estimator", "scores", 80, 0.5), ("gendr", "mse", 60, 0.8),
    ("adc", "l1", 60, 0.9), ("pix", "l1", 60, 0.9)])
def test_every_stage_overfits_one_batch(stage, loss, steps, factor, tmp_path,
                                        in_project, monkeypatch):
    no_backbone(monkeypatch)
    cfg = dataclasses.replace(
        MICRO, negative=0.0, log_every=5, save_every=1000, learning_rate=5e-3,
        gendr_learning_rate=5e-3, student_learning_rate=3e-3, vae_learning_rate=3e-3,
        ema=0.5, distill="cid", lambda_distill=0.1, lambda_distill_adv=0.05)
    run, pairs, vae, prior = world(tmp_path, cfg, stage != "resshift")
    play_stage(stage, steps, run, pairs, vae, prior)
    first, last = first_and_last(run, stage, loss)
    assert last < factor * first


def play_stage(name, steps, run, pairs, vae, prior, at_start=lambda model: None):
    """Train one stage on what the stages before it would hand over; its model."""
    cfg, m, rows = run.cfg, {"vae": vae, "resshift": prior}, None
    if name in ("adc", "pix"):
        pairs.add("z_tea", lambda batch: batch.z_hq)
        pairs.add("y_tea", lambda batch: batch.hq)
        rows = pairs.some(4)
        m["gendr"] = g.build("gendr", m, cfg).requires_grad_(False)
    if name == "pix":
        m["adc"] = g.build("adc", m, cfg, rows).requires_grad_(False)
    model = prior if name == "resshift" else g.build(name, m, cfg, rows)
    if name == "vae":
        model.start_linear(pairs.some(4).hq)
    at_start(model)
    stage = {"vae": r.vae_stage, "resshift": r.prior_stage}.get(name)
    stage = stage(model, cfg) if stage else g.stage_of(
        name, model, m, cfg, r.Perceptual("alex") if name == "pix" else None)
    r.train(run, name, stage, pairs, steps)
    return model


@pytest.mark.parametrize("stage", ["vae", "resshift", "estimator", "gendr", "adc",
                                   "pix"])
def test_a_killed_stage_resumes_bit_for_bit(stage, tmp_path, in_project, monkeypatch):
    no_backbone(monkeypatch)
    cfg = dataclasses.replace(MICRO, lambda_distill_adv=0.1)

    def trained(folder, kill_at=None):
        torch.manual_seed(1)
        run, pairs, vae, prior = world(folder, cfg, stage != "resshift")
        batches = pairs.batches

        def dying(*arguments):
            for i, batch in enumerate(batches(*arguments)):
                if i == kill_at:
                    raise KeyboardInterrupt
                yield batch
        pairs.batches = dying
        model = play_stage(stage, 5, run, pairs, vae, prior)
        run.lock_file.close()
        return model.state_dict()
    whole = trained(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "b", kill_at=3)
    assert (tmp_path / f"b/run/{stage}.ckpt").exists()
    resumed = trained(tmp_path / "b")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_a_step_moves_its_player_alone_and_leaves_no_gradient(tmp_path, in_project):
    run, pairs, _, _ = world(tmp_path)
    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    b.bias.requires_grad_(False)
    everything, seen = [*a.parameters(), *b.parameters()], []

    def step(batch, draws):
        for player in (a, b, b):                     # b plays twice
            before = [p.detach().clone() for p in everything]
            yield player, {"loss": b(a(torch.ones(1, 1))).sum()}
            seen.append([not torch.equal(p, q) for p, q in zip(everything, before)])
            assert all(p.grad is None for p in everything)
    r.train(run, "s", (step, {a: 1e-3, b: 1e-3}), pairs, 1)
    assert seen == [[True, True, False, False]] + 2 * [[False, False, True, False]]


def test_pairs_without_a_pool_come_from_the_loader_and_repeat(tmp_path, in_project,
                                                              capsys):
    cfg = dataclasses.replace(MICRO, pool=0, train_data="tiny_data")
    pairs = r.Pairs(cfg)
    pairs.fill()
    calls = []
    pairs.add("z_hq", lambda batch: calls.append(1) or 2 * batch.hq)
    whole = list(pairs.batches("pix", 0, 3))
    two = r.Pairs(dataclasses.replace(cfg, workers=2)).batches("pix", 2, 3)
    for a, b in zip(whole[2:], two):                 # two processes, later steps alone
        assert torch.equal(a.hq, b.hq) and torch.equal(a.scores, b.scores)
    assert not torch.equal(whole[0].hq, whole[1].hq)
    assert not calls and torch.equal(whole[0].z_hq, 2 * whole[0].hq) and calls == [1]
    with pytest.raises(AttributeError, match="y_tea"):
        whole[0].y_tea
    assert whole[0].lq_up.shape == (4, 3, 32, 32)
    small = dataclasses.replace(cfg, crop=256)       # what is too small is left out
    r.Pairs(small)
    said = capsys.readouterr().out.splitlines()[-1]
    used, left = [int(n) for n in said.split() if n.isdigit()][:2]
    sizes = [min(Image.open(f).size) for f in r.picture_files("tiny_data")]
    assert used == sum(n >= 256 for n in sizes) and used + left == len(sizes) and left
    Image.new("RGB", (20, 20)).save(tmp_path / "thumb.png")
    with pytest.raises(r.UserError, match="no picture has a 256 pixel crop"):
        r.Pairs(dataclasses.replace(small, train_data=str(tmp_path)))


def moved(module, device, **_):
    """Module.to, which fake tensors do not support: with new parameters if it moves."""
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, v in own.items():
                if v is not None and v.device != device:
                    there = v.detach().to(device)
                    own[name] = nn.Parameter(there, v.requires_grad) if isinstance(
                        v, nn.Parameter) else there
    return module


def test_every_stage_keeps_its_tensors_on_the_gpu(monkeypatch):
    """Fake CUDA tensors, without a GPU: one that stays on the CPU raises."""
    cuda = torch.device("cuda", 0)
    cfg = dataclasses.replace(MICRO, distill="cid", lambda_distill_adv=0.1,
                              vae_lora_rank=2, negative=0.5)
    for script in (r, g):
        monkeypatch.setattr(script, "device", lambda: cuda)
    monkeypatch.setattr(nn.Module, "to", moved)
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, memo: self,
                        raising=False)
    with FakeTensorMode():
        with pytest.raises(RuntimeError, match="two .*devices"):
            torch.ones(2).to(cuda) + torch.ones(2)
        m, sizes = {}, {"hq": (3, 32, 32), "lq_up": (3, 32, 32), "y_tea": (3, 32, 32),
                        "z_hq": (16, 4, 4), "z_lq": (16, 4, 4), "z_tea": (16, 4, 4),
                        "lq": (3, 8, 8), "scores": (2,), "estimate": (2,)}
        batch = r.Batch(**{k: torch.rand(4, *n).to(cuda) for k, n in sizes.items()})
        for name in STAGES:
            rows = batch if name in ("adc", "pix") else None
            model = m[name] = g.build(name, m, cfg, rows).to(cuda)
            stage = {"vae": r.vae_stage, "resshift": r.prior_stage}.get(name)
            step, rates = stage(model, cfg) if stage else g.stage_of(
                name, model, m, cfg, lambda a, b: (a - b).abs().mean((1, 2, 3)))
            played = list(step(batch, r.Draws(0)))
            assert {player for player, _ in played} == set(rates)
            for player, losses in played:
                assert all(p.device == cuda for p in player.parameters())
                assert all(loss.device == cuda for loss in losses.values())
            model.requires_grad_(False)


def test_parts_of_a_run_start_alike_and_notice_what_they_stand_on(tmp_path, in_project):
    run, _, vae, _ = world(tmp_path)
    draws, file = [], run.folder / "vae.safetensors"
    r.save_weights(vae.state_dict(), file)

    def build():
        draws.append(torch.rand(3))
        return r.ResShift(MICRO)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        part = run.part(name, ["vae"], seed=seed, kappa=0.5)
        r.chapter(part, "resshift", build, lambda m: None)
        assert part.cfg.kappa == 0.5 and (part.folder / "resshift.safetensors").exists()
        part.lock_file.close()
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    run.part("a", ["vae"], seed=3, kappa=0.5).lock_file.close()
    r.save_weights(r.VAE(MICRO).state_dict(), file)          # the VAE is trained anew
    with pytest.raises(r.UserError, match="another on"):
        run.part("a", ["vae"], seed=3, kappa=0.5)


def test_checkpointing_changes_memory_and_nothing_else():
    cfg = dataclasses.replace(MICRO, checkpointing=True)
    plain, thrifty = wake(r.UNet(MICRO, 3, 3)), r.UNet(cfg, 3, 3)
    thrifty.load_state_dict(plain.state_dict())
    x, context, peaks = randn(1, 3, 32, 32), randn(1, 2, 8), []
    for unet in (plain, thrifty):
        peaks.append(g.peak_bytes(lambda: unet(x, torch.tensor([9]), context).square(
            ).mean().backward()))
    close(plain.conv_in.weight.grad, thrifty.conv_in.weight.grad, 1e-6)
    assert peaks[1] < 0.8 * peaks[0]


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    """All stages, adversarial ones included: gradients are means over processes."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_HOME": "/nonexistent",
                        "https_proxy": "http://127.0.0.1:9"}
    here = str(HERE / "test_gendr_pix.py")
    both = [sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc_per_node=2", here, str(tmp_path / "two"), "2"]
    one = [sys.executable, here, str(tmp_path / "one"), "4"]
    for call in (both, one):
        done = subprocess.run(call, cwd=HERE, env=env, capture_output=True, text=True,
                              timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]
    for stage in STAGES:
        two, one = (load_file(tmp_path / name / f"{stage}.safetensors")
                    for name in ("two", "one"))
        start = load_file(tmp_path / "one" / f"{stage}-start.safetensors")
        assert two.keys() == one.keys()
        for key in one:
            close(two[key], one[key], 1e-5)
        assert any(not torch.allclose(start[k], one[k], atol=1e-4) for k in one)
    alone = [sys.executable, here, str(tmp_path / "two"), "2"]
    done = subprocess.run(alone, cwd=HERE, env=env, capture_output=True, text=True,
                          timeout=280)                       # two began, one goes on
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("resuming at step 2") == len(STAGES)


STAGES = ("vae", "resshift", "estimator", "gendr", "adc", "pix")


def train_every_stage(folder, batch):
    """What the two processes of the test above run: three steps of every stage."""
    # Adam divides by the gradient's size, so that rounding in a gradient of nearly 0
    # moves a weight by a part of the learning rate: 3 small steps keep it under 1e-5.
    cfg = dataclasses.replace(
        MICRO, batch=batch, estimator_batch=batch, pool=8, negative=0.3,
        lambda_distill_adv=0.1, **{f"{k}learning_rate": 3e-4 for k in (
            "", "gendr_", "student_", "critic_", "vae_", "estimator_", "fake_")})
    for stage in STAGES:
        torch.manual_seed(1)
        run, pairs, vae, prior = world(Path(folder) / stage, cfg, stage != "resshift")
        model = play_stage(stage, 3, run, pairs, vae, prior, lambda m: r.save_weights(
            m.state_dict(), Path(folder) / f"{stage}-start.safetensors"))
        r.save_weights(model.state_dict(), Path(folder) / f"{stage}.safetensors")
        if r.rank_and_size()[0] == 0:
            run.lock_file.close()


def test_a_loss_that_is_not_finite_stops_the_stage_by_name(tmp_path, in_project):
    run, pairs, _, _ = world(tmp_path)
    model = nn.Linear(1, 1)

    def step(batch, draws):
        yield model, {"fine": model.weight.sum(), "broken": model.weight.sum() / 0 * 0}
    with pytest.raises(FloatingPointError, match="stage.*broken"):
        r.train(run, "stage", (step, {model: 1e-3}), pairs, 1)


def test_a_run_refuses_other_settings_and_a_second_process(tmp_path):
    r.Run(tmp_path, MICRO).lock_file.close()
    free = dataclasses.replace(MICRO, save_every=7, log_every=9, workers=1)
    r.Run(tmp_path, free).lock_file.close()          # what changes no result may change
    with pytest.raises(r.UserError, match="another crop"):
        r.Run(tmp_path, dataclasses.replace(MICRO, crop=64))
    first = r.Run(tmp_path / "two", MICRO)
    with pytest.raises(r.UserError, match="another process"):
        r.Run(tmp_path / "two", MICRO)
    first.lock_file.close()
    assert r.Run(tmp_path).cfg == free


def test_weights_files_are_checked(tmp_path):
    model, file = nn.Linear(2, 3), tmp_path / "w.safetensors"
    r.save_weights(model.state_dict(), file)
    twin = nn.Linear(2, 3)
    r.load_weights(twin.state_dict(), file)
    assert torch.equal(twin.weight, model.weight)
    with pytest.raises(r.UserError, match=r"\(3, 2\), the network's \(4, 2\)"):
        r.load_weights(nn.Linear(2, 4).state_dict(), file)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(r.UserError, match="not a weights file"):
        r.load_weights(twin.state_dict(), file)


# ---- gendr_pix.py, 1 and 2: scores and LoRA ------------------------------------------


def awake_restorer(cfg=MICRO, seed=0):
    """A GenDR whose prior, LoRA and prompts all have random weights."""
    torch.manual_seed(seed)
    prior, vae = wake(r.ResShift(cfg)).requires_grad_(False), r.VAE(cfg)
    vae.start_linear(randn(8, 3, 32, 32))
    return g.gendr_from_prior(prior, vae, cfg), prior


def test_lora_with_zero_b_changes_nothing():
    x = randn(2, 3, 8, 8)
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=1)
    layer = g.LoRALayer(conv, 4)
    layer.matrix = randn(2, 4, 4)
    assert torch.equal(layer(x), conv(x))


def by_hand(layer, x, m):
    """W + s B M^T A as one weight, applied to one image."""
    delta = layer.B.weight.flatten(1) @ m.T @ layer.A.weight.flatten(1)
    weight = layer.base.weight + layer.scale * delta.view_as(layer.base.weight)
    if isinstance(layer.base, nn.Linear):
        return F.linear(x, weight, layer.base.bias)
    return F.conv2d(x, weight, layer.base.bias, layer.base.stride, layer.base.padding)


@pytest.mark.parametrize("base, shape", [
    (nn.Linear(6, 5), (2, 7, 6)),
    (nn.Conv2d(3, 5, 3, stride=2, padding=1), (2, 3, 9, 8))])
def test_lora_equals_the_merged_weight_by_hand_and_folds(base, shape):
    layer, x = wake(g.LoRALayer(base, 4)), randn(*shape)
    assert layer.scale == 8 / 4
    layer.matrix = randn(2, 4, 4, seed=1)
    y = layer(x)
    for i in range(2):                                              # M per image
        close(y[i:i + 1], by_hand(layer, x[i:i + 1], layer.matrix[i]), 1e-5)
    before, plain = layer.matrix, layer.base.weight.clone()
    layer.matrix = before[:1]
    layer.fold()
    close(layer(x[:1]), y[:1], 1e-5)
    layer.unfold()
    assert torch.equal(layer.base.weight, plain)


def test_fold_equals_the_unfolded_network_and_unfold_restores_it():
    model, _ = awake_restorer()
    wake(model.lora)
    for layer in g.lora_layers(model.unet):
        nn.init.normal_(layer.B.weight, std=0.02)
    x, scores = randn(1, 3, 16, 16), torch.tensor([[0.2, 0.9]])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        y = model(x, scores)
        with g.folded(model, scores):
            close(model(x), y, 1e-4)                 # the scores are in W'
            with pytest.raises(ValueError):          # and others cannot be meant
                model(x, scores)
        with pytest.raises(ValueError):
            model(x)
        assert not torch.allclose(model(x, torch.tensor([[0.9, 0.1]])), y, atol=1e-3)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(ValueError):
        g.fold(model, torch.zeros(2, 2))


def test_lora_on_the_vae_encoder_is_guided_trained_and_folded(tmp_path, in_project):
    cfg = dataclasses.replace(MICRO, vae_lora_rank=2)
    run, pairs, vae, prior = world(tmp_path, cfg)
    nn.init.normal_(vae.quant_conv.weight, std=0.1)      # else the encoder is not heard
    pairs.add("z_lq", lambda batch: vae.encode(batch.lq_up))
    gendr, plain = (g.gendr_from_prior(prior, vae, c) for c in (cfg, MICRO))
    batch = pairs.some(2)
    with torch.no_grad():
        close(gendr.latent(batch), plain.latent(batch), 1e-4)       # B = 0
        decoded = gendr.end_out.decode(batch.z_hq)
    assert max(gendr.end_lora.block_of.values()) == 5               # 4 down, mid, out
    r.train(run, "gendr", g.gendr_stage(prior, gendr, cfg), pairs, 3)
    layers = g.lora_layers(gendr.end_in)
    assert all(m.B.weight.abs().sum() > 0 for m in layers)
    assert not any(m.base.weight.requires_grad for m in layers)
    x, scores = batch.lq_up[:1], torch.tensor([[0.3, 0.8]])
    for layer in layers:
        nn.init.normal_(layer.B.weight, std=0.05)
    with torch.no_grad():
        close(gendr.end_out.decode(batch.z_hq), decoded)            # the decoder is not
        y = gendr(x, scores)
        with g.folded(gendr, scores):
            close(gendr(x), y, 1e-4)
        assert not torch.allclose(gendr(x, 1 - scores), y, atol=1e-4)
    adc = g.pixel_input(gendr, cfg, batch)
    assert adc.end_lora is None and not g.lora_layers(adc.end_in)


def test_a_chapter_stores_what_is_its_own_and_loads_the_same_model(tmp_path,
                                                                   in_project):
    run, pairs, vae, prior = world(tmp_path)
    m, x, scores = {"vae": vae, "resshift": prior}, photo(32), torch.rand(1, 2)
    pairs.add("z_tea", lambda batch: batch.z_hq)
    made = []
    for name in ("gendr", "adc"):
        kept = g.chapter(run, name, lambda: g.build(name, m, MICRO, pairs.some(4)),
                         wake, list(m.values()))
        state = load_file(run.folder / f"{name}.safetensors")
        assert not any(k.startswith(("end_in", "end_out")) for k in state)   # the VAE
        again = g.chapter(run, name, lambda: g.build(name, m, MICRO), None,
                          list(m.values()))
        with torch.no_grad():
            assert torch.equal(again(x, scores), kept(x, scores))
        made.append(state)
        m[name] = kept
    base = "unet.mid_block.resnets.0.conv1.base.weight"      # GenDR's is the prior's,
    assert base not in made[0] and base in made[1]           # GenDR-Adc's is its own


def test_a_trained_chapter_stores_the_weights_that_it_returns(tmp_path, in_project):
    run, pairs, _, start = world(tmp_path, dataclasses.replace(MICRO, prior_steps=3))
    prior = r.chapter_prior(run, pairs)                      # averaged in the end
    state = load_file(run.folder / "resshift.safetensors")
    assert state.keys() == prior.state_dict().keys()
    for name, value in prior.state_dict().items():
        assert torch.equal(state[name], value), name
    assert not torch.equal(state["unet.conv_in.bias"], start.unet.conv_in.bias)


def test_score_embedding_is_the_papers_formula():
    embed = g.ScoreEmbedding(blocks=3, rank=2)
    assert torch.equal(embed(torch.rand(1, 2))[0, 2], torch.eye(2))
    wake(embed)
    scores = torch.tensor([[0.3, 0.7]])
    w = embed.frequencies
    e = torch.cat([torch.sin(2 * math.pi * 0.3 * w), torch.cos(2 * math.pi * 0.3 * w),
                   torch.sin(2 * math.pi * 0.7 * w), torch.cos(2 * math.pi * 0.7 * w)])
    d = torch.relu(embed.d_mlp[0](e))
    b = torch.relu(embed.block_mlp[0](embed.block_embedding[1]))
    close(embed(scores)[0, 1], embed.to_matrix(torch.cat([d, b])).view(2, 2), 1e-5)


# ---- gendr_pix.py, 3: one restorer, two ends -----------------------------------------


@pytest.mark.parametrize("shortcut", [True, False])
def test_students_first_step_is_the_priors_at_x_T_equal_y0(shortcut):
    cfg = dataclasses.replace(MICRO, shortcut=shortcut)
    student, prior = awake_restorer(cfg)
    y0 = randn(2, 16, 4, 4)
    with torch.no_grad():
        expected = prior(y0, y0, torch.full((2,), cfg.steps))
        student.guide(torch.rand(2, 2, generator=rng()))
        close(student.step(y0), expected, 1e-5)


def test_prior_and_student_share_one_base_network():
    student, prior = awake_restorer()
    shared = student.unet.mid_block.resnets[0].conv1.base.weight
    assert shared is prior.unet.mid_block.resnets[0].conv1.weight
    assert not shared.requires_grad and student.unet.conv_in.weight.requires_grad
    assert student.prompts.table.requires_grad


def test_least_squares_finds_an_exact_linear_map():
    conv, start = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
    x = randn(4, 3, 12, 12)
    with torch.no_grad():
        g.fit_conv(start, x, conv(x))
    close(start.weight, conv.weight, 1e-3)
    close(start.bias, conv.bias, 1e-3)


def test_new_ends_start_near_their_teacher_and_keep_the_size():
    gendr, _ = awake_restorer()
    x, scores = photo(64), torch.zeros(1, 2)
    batch = r.Batch(lq_up=x, estimate=scores)
    adc = g.pixel_input(gendr, MICRO, batch)
    with torch.no_grad():
        # encode is linear here (a fresh VAE), so a linear end can match it exactly
        close(adc.shortcut(adc.end_in.encode(x)), gendr.end_in.encode(x), 2e-2)
        batch.y_tea = adc(x, scores)
        pix = g.pixel_output(adc, MICRO, batch)
        rough = g.pixel_output(adc, dataclasses.replace(MICRO, least_squares=False))
        error, plain = ((m(x, scores) - batch.y_tea).square().mean()
                        for m in (pix, rough))
    assert error < 0.5 * plain
    assert pix(randn(1, 3, 24, 40), torch.zeros(1, 2)).shape == (1, 3, 24, 40)
    bare = g.Restorer(r.PixelShuffle(8), r.UNet(MICRO, 192, 192), r.PixelShuffle(8))
    assert bare(randn(2, 3, 40, 24), torch.zeros(2, 2)).shape == (2, 3, 40, 24)
    assert not any(p.requires_grad for p in adc.end_out.parameters())


# ---- gendr_pix.py, 4: score distillation ---------------------------------------------


class Line:
    """Everything is Gaussian in one dimension, so the exact networks are lines.

    Data N(m, s^2), a generator z_g = a u + b, u ~ N(0, 1), the chain's marginal z_t =
    c z_g + eta y0 + sqrt(n) eps with c = 1 - eta, n = kappa^2 eta.  All losses are
    quadratic in (u, eps), so the four points (+-1, +-1), whose first and second moments
    are the Gaussian's, give the exact expectation.
    """
    m, s, y0, eta, kappa = 0.7, 0.9, -0.4, 0.3, 1.1
    c, n = 1 - eta, kappa ** 2 * eta
    u = torch.tensor([1.0, 1.0, -1.0, -1.0]).double().view(4, 1, 1, 1)
    eps = torch.tensor([1.0, -1.0, 1.0, -1.0]).double().view(4, 1, 1, 1)

    def exact(self, mean, std):
        """Slope k and intercept of E[x0 | x_t] for x0 ~ N(mean, std^2)."""
        k = self.c * std ** 2 / (self.c ** 2 * std ** 2 + self.n)
        return k, mean - k * (self.c * mean + self.eta * self.y0)

    def loss(self, loss, a, b, psi, xi, z_h):
        """A loss of the generator (a, b) with psi exact for another (a, b), w = 1."""
        z_g = a * self.u + b
        z_t = self.c * z_g + self.eta * self.y0 + self.n ** 0.5 * self.eps
        real, fake = (k * z_t + i for k, i in (self.exact(self.m, self.s), psi))
        z_h = torch.full_like(z_g, self.m) if z_h is None else z_h
        if loss is g.vsd_loss:
            return loss(z_g, real, fake, 1.0)
        if loss is g.sid_loss:
            return loss(z_g, real, fake, 1.0, xi)
        return loss(z_h, real, real, fake, 1.0, xi)

    def gradient(self, loss, a, b, xi=1.2, z_h=None):
        """(dL/da, dL/db) by autograd, psi exact for (a, b) and frozen."""
        at = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (a, b)]
        self.loss(loss, *at, self.exact(b, a), xi, z_h).backward()
        return tuple(v.grad.item() for v in at)


def test_vsd_gradient_is_that_of_the_kl_divergence():
    line, a, b = Line(), 0.5, 0.2
    got = line.gradient(g.vsd_loss, a, b)
    # KL(N(mu, v) || N(mu*, v*)) of the noised Gaussians, its derivatives by hand, and
    # the factor kappa^2 eta / (1 - eta)^2 between scores of z_t and clean predictions.
    v, real = line.c ** 2 * a ** 2 + line.n, line.c ** 2 * line.s ** 2 + line.n
    factor = line.n / line.c ** 2
    close(got[0], factor * (1 / real - 1 / v) * line.c ** 2 * a, 1e-9)
    close(got[1], factor * line.c ** 2 * (b - line.m) / real, 1e-9)


@pytest.mark.parametrize("loss", [g.sid_loss, g.cid_loss])
def test_sid_and_cid_gradients_in_closed_form(loss):
    line, a, b, xi = Line(), 0.5, 0.2, 1.2
    (k, i), (k_psi, i_psi) = line.exact(line.m, line.s), line.exact(b, a)
    q, mu, c = k - k_psi, line.c * b + line.eta * line.y0, line.c
    gap, at_mean = i - i_psi + q * mu, i + k * mu        # E[f_phi - f_psi], E[f_phi]
    if loss is g.sid_loss:        # E[gap (f_phi - z_g)] = ... + q k v - q c a^2
        da = 2 * q * k * c ** 2 * a - 2 * q * c * a
        db = c * q * (at_mean - b) + gap * (k * c - 1)
    else:                         # the HQ latent stands still: z_h = m
        da = 2 * q * k * c ** 2 * a
        db = c * q * (at_mean - line.m) + gap * k * c
    da -= 2 * xi * q ** 2 * c ** 2 * a                   # - xi E[gap^2]
    db -= 2 * xi * gap * q * c
    got = line.gradient(loss, a, b, xi)
    close(got[0], da, 1e-9)
    close(got[1], db, 1e-9)


@pytest.mark.parametrize("loss", [g.vsd_loss, g.sid_loss])
def test_generator_converges_to_the_datas_mean_and_variance(loss):
    line, a, b = Line(), 0.3, -0.5
    for _ in range(3000):
        da, db = line.gradient(loss, a, b, xi=1.0)
        a, b = a - 0.2 * da, b - 0.2 * db
    assert abs(a - line.s) < 1e-3 and abs(b - line.m) < 1e-3


def test_cid_teaches_a_deterministic_generator_and_can_repel_another():
    line, b = Line(), -0.5
    # a = 0: psi is b itself, and for xi = 1 the gradient is c k (b - m): a regression
    k = line.exact(line.m, line.s)[0]
    close(line.gradient(g.cid_loss, 0.0, b, 1.0)[1], line.c * k * (b - line.m), 1e-9)
    for _ in range(300):
        b -= 0.5 * line.gradient(g.cid_loss, 0.0, b, xi=1.0)[1]
    assert abs(b - line.m) < 1e-3
    # With the data's own spread the sign turns: it pushes b = 0.5 away from m = 0.7.
    assert line.gradient(g.cid_loss, line.s, 0.5, xi=1.0)[1] > 0
    assert line.gradient(g.sid_loss, line.s, 0.5, xi=1.0)[1] < 0


def test_distillation_rests_where_the_two_score_networks_agree():
    line = Line()
    for loss in (g.vsd_loss, g.sid_loss, g.cid_loss):
        close(line.gradient(loss, line.s, line.m), (0.0, 0.0), 1e-9)


def test_distillation_guides_weighs_and_shares_the_base_network():
    gendr, prior = awake_restorer()
    fake = g.fake_score_from(prior, MICRO)
    z, z_h, y0 = (randn(2, 16, 4, 4, seed=s) for s in (1, 2, 3))
    cfg = dataclasses.replace(MICRO, distill="cid", distill_t=2, cid_guidance=1.5)
    z_t, t = g.noised(prior.chain, z, y0, r.Draws(7), cfg)
    assert set(t.tolist()) <= {1, 2}
    eta = prior.chain.at(prior.chain.eta, t, z)              # z_t is on the chain
    noise = (z_t - z - eta * (y0 - z)) / (cfg.kappa * eta.sqrt())
    assert abs(noise.std().item() - 1) < 0.15
    with torch.no_grad():
        real, negative = prior(z_t, y0, t), prior(z_t, y0, t, r.NEGATIVE)
        close(fake(z_t, y0, t), real, 1e-5)                  # psi starts as phi
        w = 1 / (z - real).abs().mean((1, 2, 3), keepdim=True)       # SiD's normaliser
        gap = 0.5 * (real - negative)                        # f_phi^cfg - f_psi
        expected = (w * gap * (real + gap - z_h)).mean()
        got = g.distillation(prior, fake, z, z_h, y0, r.Draws(7), cfg)
    close(got, expected, 1e-4)
    base = fake.unet.mid_block.resnets[0].conv1.base.weight
    assert base is prior.unet.mid_block.resnets[0].conv1.weight      # one base network


def test_distillation_leaves_a_latents_mean_to_the_regression():
    gendr, prior = awake_restorer()
    cfg = dataclasses.replace(MICRO, distill="vsd", lambda_mean=10.0)
    z_l, z_h, z_g = (randn(2, 16, 4, 4, seed=s) for s in (1, 0, 2))
    z_g.requires_grad_(True)
    fake = wake(g.fake_score_from(prior, cfg))
    g.distillation(prior, fake, z_g, z_h, z_l, r.Draws(1), cfg).backward()
    assert z_g.grad.abs().max() > 1e-5
    close(z_g.grad.mean((2, 3)), torch.zeros(2, 16), 1e-9)
    batch = r.Batch(z_hq=z_h, z_lq=z_l, estimate=torch.rand(2, 2, generator=rng()))
    cfg = dataclasses.replace(cfg, negative=0.0)
    step, _ = g.gendr_stage(prior, gendr, cfg)
    (_, losses), (_, fake_losses) = step(batch, r.Draws(0))
    assert set(losses) == {"mse", "mean", "vsd"} and set(fake_losses) == {"fake"}
    with torch.no_grad():
        error = gendr.latent(batch) - z_h
    close(losses["mse"], error.square().mean(), 1e-5)
    close(losses["mean"], 10 * error.mean((2, 3)).square().mean(), 1e-5)


def test_a_gendr_step_moves_all_three_players_and_nobody_else(tmp_path, in_project):
    cfg = dataclasses.replace(MICRO, distill="cid", lambda_distill_adv=0.1)
    run, pairs, vae, prior = world(tmp_path, cfg)
    wake(prior).requires_grad_(False)
    gendr = g.gendr_from_prior(prior, vae, cfg)
    step, rates = g.gendr_stage(prior, gendr, cfg)
    assert len(rates) == 3 and next(iter(rates)) is gendr
    frozen = [p for m in (prior, vae) for p in m.parameters()]
    before = [p.clone() for p in frozen]
    own = {m: [p for p in m.parameters() if p.requires_grad] for m in rates}
    starts = {m: [p.detach().clone() for p in ps] for m, ps in own.items()}
    r.train(run, "gendr", (step, rates), pairs, 2)
    assert all(torch.equal(p, q) for p, q in zip(frozen, before))
    for module, parameters in own.items():
        assert any(not torch.equal(p, q) for p, q in zip(parameters, starts[module]))
    assert all(p.grad is None for ps in [frozen, *own.values()] for p in ps)


# ---- gendr_pix.py, 5: padding, Fourier loss, discriminator ---------------------------


def test_rand_pad_keeps_content_and_moves_the_phase():
    x = randn(1, 3, 16, 16)
    for ph, pw in ((0, 0), (3, 5), (7, 7)):
        y = g.rand_pad(x, ph, pw)
        assert y.shape == (1, 3, 24, 24)
        assert torch.equal(y[:, :, ph:ph + 16, pw:pw + 16], x)
    impulse = torch.zeros(1, 3, 16, 16)
    impulse[:, :, 0, 0] = 1                              # goes to channel 3 * 8 + 5
    z = F.pixel_unshuffle(g.rand_pad(impulse, 3, 5), 8)
    assert z[0, 3 * 8 + 5, 0, 0] == 1


def test_masked_fourier_loss_is_zero_for_equals_and_blind_off_the_lattice():
    x = randn(1, 1, 64, 64)
    assert g.masked_fourier_loss(x, x) == 0
    n = torch.arange(64)
    off = torch.cos(2 * math.pi * 3 * n / 64)[:, None] * torch.ones(64)   # bin 3: off
    close(g.masked_fourier_loss(x + off, x), torch.tensor(0.0), 1e-5)
    mean = torch.full_like(x, 0.5)                       # bin (0, 0): left out
    close(g.masked_fourier_loss(x + mean, x), torch.tensor(0.0), 1e-5)


def test_masked_fourier_loss_of_a_period_8_pattern_in_closed_form():
    n, amplitude = torch.arange(64), 0.25
    pattern = amplitude * torch.cos(2 * math.pi * n / 8)[None, None, :, None]
    y = pattern.expand(1, 1, 64, 64)
    # ortho fft2: two bins, (8, 0) and (56, 0), of amplitude / 2 * 64 each; the mask
    # holds 64 windows of 9 bins less the window at (0, 0)
    expected = 2 * amplitude / 2 * 64 / (64 * 9 - 9)
    close(g.masked_fourier_loss(y, torch.zeros_like(y)), torch.tensor(expected), 1e-5)
    assert g.fourier_mask(64, 64).sum() == 64 * 9 - 9
    assert g.fourier_mask(64, 64, radius=0).sum() == 63      # the lattice itself
    assert g.fourier_mask(64, 64, radius=4).sum() == 64 * 64 - 81    # all but (0, 0)'s


class Blur(nn.Module):
    """A translation-equivariant stand-in for a restorer."""
    end_out = r.PixelShuffle(8)

    def __init__(self):
        super().__init__()
        self.unet = nn.Identity()
        self.unet.cfg = MICRO

    def guide(self, scores):
        pass

    def forward(self, x, scores=None, prompt=r.POSITIVE):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) + 0 * prompt


def test_pad_cfg_at_weight_one_is_the_padded_positive_branch():
    gendr, _ = awake_restorer()
    pix = g.pixel_output(g.pixel_input(gendr, MICRO), MICRO)
    wake(pix)
    x, scores = randn(1, 3, 16, 24), torch.zeros(1, 2)
    with torch.no_grad():
        y = g.pad_cfg(pix, x, 1.0, scores)
        branch = pix(F.pad(x, (4, 4, 4, 4), mode="reflect"), scores, r.POSITIVE)
        close(y, branch[:, :, 4:20, 4:28], 1e-5)
        assert not torch.allclose(y, g.pad_cfg(pix, x, 1.2, scores), atol=1e-4)


def test_pad_cfg_of_an_equivariant_model_is_the_unpadded_result():
    x = randn(1, 3, 16, 16)
    inside = (..., slice(1, -1), slice(1, -1))               # borders see the padding
    close(g.pad_cfg(Blur(), x, 1.3)[inside], Blur()(x)[inside], 1e-5)


def test_generators_adversarial_step_leaves_no_gradient_in_the_discriminator(
        tmp_path, in_project):
    run, pairs, vae, prior = world(tmp_path)
    m = {"vae": vae, "resshift": prior}
    m["gendr"] = g.build("gendr", m, MICRO).requires_grad_(False)
    pairs.add("z_tea", lambda batch: batch.z_hq)
    student = g.build("adc", m, MICRO, pairs.some(4))
    step, rates = g.adc_stage(m["gendr"], student, MICRO)
    critic = list(rates)[1]
    start = [p.detach().clone() for p in critic.parameters()]
    moves = step(pairs.some(4), r.Draws(0))
    player, losses = next(moves)
    r.descend(torch.optim.Adam(p for p in student.parameters() if p.requires_grad),
              losses, 1e-3, 1.0, "adc")
    assert player is student and losses["adv"] > 0
    assert all(p.grad is None for p in critic.parameters())
    assert all(torch.equal(p, q) for p, q in zip(critic.parameters(), start))
    player, losses = next(moves)                     # D's own: it sees no student
    trained = [p for p in student.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(losses["d"], trained, allow_unused=True,
                                    retain_graph=True)
    assert player is critic and all(x is None for x in gradients)
    assert all(x is not None for x in torch.autograd.grad(
        losses["d"], list(critic.parameters())))


def test_discriminator_reads_the_end_of_every_level():
    gendr, _ = awake_restorer()
    critic, h = g.Discriminator(gendr, MICRO), randn(1, 16, 8, 8)
    seen = []
    block = critic.backbone[0].unet.down_blocks[0]
    block.attentions[-1].register_forward_hook(lambda m, x, y: seen.append(y))
    features = critic.features(h)
    shapes = [tuple(f.shape[1:]) for f in features]
    assert shapes == [(16, 8, 8), (32, 4, 4), (32, 4, 4)]
    assert torch.equal(features[0], seen[0])


def test_adversarial_losses_are_the_softplus_formulas():
    gendr, _ = awake_restorer()
    critic = g.Discriminator(gendr, MICRO)
    h = randn(2, 16, 4, 4, seed=1)
    fake, real = critic.features(randn(2, 16, 4, 4)), critic.features(h)
    expected = torch.log1p(critic.judge(fake).exp()).mean() + torch.log1p(
        (-critic.judge(real)).exp()).mean()
    close(critic.losses(fake, critic.features(h))["d"], expected, 1e-5)


# ---- gendr_pix.py, 6 and 7: negatives, restore ---------------------------------------


def test_online_negatives_swap_prompt_and_target_together():
    cfg = dataclasses.replace(MICRO, negative=0.25)
    prompt, target = r.negatives(torch.ones(400, 1, 1, 1), torch.zeros(400, 1, 1, 1),
                                 r.Draws(0), cfg)
    assert torch.equal(target.flatten() == 0, prompt == r.NEGATIVE)
    assert abs((prompt == r.NEGATIVE).float().mean().item() - 0.25) < 0.07


def test_restore_keeps_any_size_and_tiles_agree_with_one_piece():
    lq, scores = photo(60)[:, :, :53, :60], torch.zeros(1, 2)
    whole = g.restore(Blur(), None, lq, 4, scores=scores)
    assert whole.shape == (1, 3, 212, 240)
    tiled = g.restore(Blur(), None, lq, 4, tile=192, scores=scores)
    close(whole, tiled, 1e-5)            # the overlap covers all that a pixel sees
    for side in (1, 2, 3):
        assert g.restore(Blur(), None, photo(16)[:, :, :side, :1], 1, passes=4,
                         scores=scores).shape == (1, 3, side, 1)


def test_restore_does_not_shift_the_picture():
    lq = photo(48) + photo(48).flip(2, 3)
    up = g.restore(Blur(), None, lq / 2, 4, scores=torch.zeros(1, 2))
    close(up, up.flip(2, 3), 1e-5)


def test_scores_set_by_hand_replace_the_estimators():
    model, _ = awake_restorer()
    wake(model.lora)
    for layer in g.lora_layers(model.unet):
        nn.init.normal_(layer.B.weight, std=0.02)
    estimator, lq = g.DegradationEstimator(MICRO), photo(16)
    own = g.restore(model, estimator, lq, 4)
    close(g.restore(model, estimator, lq, 4, scores=estimator(lq)), own, 1e-5)
    other = g.restore(model, estimator, lq, 4, scores=torch.tensor([[0.9, 0.1]]))
    assert not torch.allclose(other, own, atol=1e-3)


def test_guidance_at_weight_one_is_the_positive_branch_in_latent_space():
    gendr, _ = awake_restorer()
    x, scores = randn(1, 3, 16, 16), torch.zeros(1, 2)
    with torch.no_grad():
        close(g.guided(gendr, x, 1.0, scores), gendr(x, scores), 1e-4)


def test_spearman_and_peak_memory_by_hand():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert g.spearman(a, a ** 3) == pytest.approx(1) and g.spearman(a, -a) == \
        pytest.approx(-1)
    assert g.spearman(a, torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.8)
    tied = torch.tensor([1.0, 2.0, 2.0, 3.0])                # ranks 1, 2.5, 2.5, 4
    assert g.spearman(a, tied) == pytest.approx(4.5 / math.sqrt(5 * 4.5))
    x = torch.zeros(1, 1000)

    def function():
        y = x + 1                                            # 4,000 bytes
        z = y * 2                                            # 8,000 alive
        del y
        z += 1                                               # in place: nothing new
        return z * 2                                         # 8,000 again
    peak = g.measure(function, MICRO, 0.01)[1]               # and scalars
    assert peak == pytest.approx(8000, abs=64)
    layer = nn.Linear(1000, 10).requires_grad_(False)
    assert g.measure(lambda: layer(x), MICRO, 0.01)[1] == 40     # no weights, no input


def test_claims_have_floors_and_bars_on_either_side():
    row = {"psnr": 20.0, "lpips": 0.1, "spectral": 10.0, "lattice": 0.0}
    t = {k: dict(row) for k in ("HQ", "VAE", *g.COLUMNS)}
    bench = {f"GenDR-Pix{s}": {"faster": 3.0, "memory": -0.7} for s in ("", " guided")}
    t["VAE"]["psnr"], t["regression"]["psnr"], t["GenDR"]["spectral"] = 29, 20.4, 5.9
    rows = g.checks(t, bench, [0.1, 0.25])
    said = {k: (g.reached(v, sign, floor), g.reached(v, sign, bar)) for
            k, (v, _, sign, floor, bar) in rows.items()}
    assert said["VAE, PSNR"] == (True, False)                # 28 and 30 dB
    assert said["prior's error at t = T over t = 1"] == (True, False)        # 2 and 3
    assert said["regression, PSNR over bicubic"] == (True, False)    # 0.3 and 0.5 dB
    assert said["GenDR, spectral distance of regression's"] == (True, True)
    assert said["ResShift, spectral distance of bicubic's"] == (False, False)
    assert said["GenDR, PSNR over ResShift"] == (False, False)       # equal is not over
    t["GenDR-Pix"]["lattice"] = 9.0
    name = "GenDR-Pix, lattice peak over HQ's"
    value, _, sign, floor, _ = g.checks(t, bench, [1, 1])[name]
    assert not g.reached(value, sign, floor)


def test_ablation_trains_every_row_and_goes_on_where_it_stopped(tmp_path, in_project,
                                                                monkeypatch):
    no_backbone(monkeypatch)
    run, pairs, vae, prior = world(tmp_path)
    m = {"vae": vae, "resshift": prior}
    for name in g.CHAPTERS:
        m[name] = m.get(name) or g.build(name, m, MICRO).requires_grad_(False)
        r.save_weights(m[name].state_dict(), run.folder / f"{name}.safetensors")
    hq = photo(64)
    held = [r.SimpleNamespace(hq=hq, lq=r.degrade(hq, MICRO, rng())[0], draw=0,
                              scale=4)]
    lpips = r.Perceptual("alex")
    monkeypatch.setattr(r.Run, "lock", lambda self: None)    # parts twice in a process
    two = g.ablate(run, m, pairs, held, lpips, 1, only=g.PIX, seeds=2)
    assert {g.PIX} | {f"{g.PIX}, {k}" for k in g.PASSES} == {
        k for k, v in two.items() if len(v) == 2}
    assert two[g.PIX][0]["psnr"] != two[g.PIX][1]["psnr"] and "seen" in two[g.PIX][0]
    assert np.array(Image.open(run.folder / "lattice.png").convert("L")).std() > 20
    assert not (run.folder / "ablation.md").exists()         # of all rows alone
    for name in ("benchmark", "counts"):
        monkeypatch.setattr(g, name, lambda *_: {})
    table, names = g.ablate(run, m, pairs, held, lpips, 1, seeds=1), g.ablation_rows(
        1, 32)
    assert table[g.PIX] == two[g.PIX][:1]                    # not trained again
    for name in (name for name in names if name.startswith("Pix: ") and name != g.PIX):
        assert table[name][0]["psnr"] != table[g.PIX][0]["psnr"], name
    assert table["Pix: plain, untrained"][0]["teacher"] < table[
        "Pix: least squares, untrained"][0]["teacher"]
    text = (run.folder / "ablation.md").read_text()
    assert all(f"| {name} " in text for name in names)
    assert json.loads((run.folder / "ablation.json").read_text())["rows"].keys() == \
        table.keys()
    monkeypatch.setattr(g, "train", None)                    # nothing is left to train
    assert g.ablate(run, m, pairs, held, lpips, 1, seeds=1)[g.PIX] == table[g.PIX]


def test_repeated_weights_keep_the_size_of_a_convolution():
    old = nn.Conv2d(3, 2, 3, padding=1)
    x = randn(1, 3, 8, 8)
    new = g.new_conv(old, 6, 5, repeated=True)
    y = new(torch.cat([x, x], dim=1))                        # inputs repeat as well
    close(y, old(x)[:, [0, 1, 0, 1, 0]], 1e-5)


def test_passes_keep_the_harmonics_that_their_phases_divide():
    """A restorer that draws one 8x8 pattern, whatever the picture, at a fixed phase."""
    class Pattern(Blur):
        def forward(self, x, scores=None, prompt=r.POSITIVE):
            tile = randn(1, 3, 8, 8, seed=5)
            return tile.repeat(1, 1, x.shape[2] // 8, x.shape[3] // 8)
    x, k = torch.zeros(1, 3, 32, 32), torch.arange(8)
    before = torch.fft.fft2(Pattern()(x))[0, 0, ::4, ::4].abs()
    for passes in (2, 4, 8, 16):
        left = (k[:, None] + 3 * k) % (passes // 2) == 0
        after = torch.fft.fft2(g.pad_cfg(Pattern(), x, 1.0, passes=passes))
        close(after[0, 0, ::4, ::4].abs(), before * left, 1e-3)
    plain = g.pad_cfg(Pattern(), x, 1.3, shift=0)
    close(plain, torch.roll(Pattern()(x), (4, 4), (2, 3)), 1e-5)


# ---- the commands --------------------------------------------------------------------


def command(script, *arguments, cwd=HERE):
    """Run a script in its own process, without a network, on one thread."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_HOME": "/nonexistent",
                        "https_proxy": "http://127.0.0.1:9"}
    return subprocess.run([sys.executable, script, *map(str, arguments)], cwd=cwd,
                          env=env, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of all chapters with a handful of steps and small networks."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    return folder, command("gendr_pix.py", *CUT, "--run", folder)


SMALL = ("--pool", 8, "--batch", 2, "--crop", 64, "--unet-widths", 16, 32, "--groups",
         8, "--head-width", 16, "--vae-widths", 8, 8, 8, 16, "--vae-groups", 4,
         "--vae-crop", 32, "--steps", 4, "--val-draws", 1,
         "--val-data", "tiny_data/val/other")
CUT = ["--train", "--tiny", *SMALL, "--size", 64, "--log-every", 2]
for _name in ("vae", "prior", "estimator", "start", "gendr", "adc", "pix"):
    CUT += [f"--{_name}-steps", 2]


def test_train_goes_through_every_stage_and_writes_every_file(finished):
    folder, done = finished
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout.splitlines()[-1].startswith(("PASS", "FAIL"))
    for name in g.CHAPTERS:
        assert (folder / f"{name}.safetensors").stat().st_size > 0
        assert not (folder / f"{name}.ckpt").exists()
    stages = {line.split(",")[0] for line in
              (folder / "log.csv").read_text().splitlines()[1:]}
    assert stages == set(g.CHAPTERS)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["lpips"] == "LPIPS (random features)"
    assert {"bicubic", "GenDR", "GenDR-Pix"} <= set(metrics["table"])
    assert done.stdout.count("PASS") + done.stdout.count("FAIL") == 1
    passed = all(c["floor"] for c in metrics["checks"].values())
    assert (done.returncode == 0) == passed
    for name in ("report.png", "spectrum.png", "curves.png"):
        array = np.array(Image.open(folder / name).convert("RGB"))
        assert array.shape[1] > 600 and array.std() > 20     # not an empty page


def test_loaded_weights_give_the_table_of_the_training_process(finished):
    folder, _ = finished
    before = json.loads((folder / "metrics.json").read_text())["table"]
    done = command("gendr_pix.py", "--eval", "--run", folder, "--size", 64)
    assert done.returncode in (0, 1), done.stderr
    after = json.loads((folder / "metrics.json").read_text())["table"]
    assert before.keys() == after.keys()
    for name in before:
        assert before[name]["psnr"] == pytest.approx(after[name]["psnr"], abs=1e-4)


def test_evaluation_on_real_pairs_measures_those_pairs_by_name(finished, tmp_path):
    folder, _ = finished
    for kind in ("lq", "hq"):
        (tmp_path / kind).mkdir()
    pictures = HERE / "tiny_data/val/other"
    for name, lq_type in (("cat", "png"), ("portrait", "bmp")):
        hq = Image.open(pictures / f"{name}.png").convert("RGB").crop((0, 0, 120, 100))
        hq.save(tmp_path / f"hq/{name}.png")
        hq.resize((30, 25), Image.BICUBIC).save(tmp_path / f"lq/{name}.{lq_type}")
    done = command("gendr_pix.py", "--eval", "--run", folder, "--data", tmp_path)
    assert done.returncode == 0, done.stderr
    row = next(x for x in done.stdout.splitlines() if "| bicubic" in x).split("|")
    expected = []
    for name in ("cat", "portrait"):
        hq = r.from_pil(Image.open(tmp_path / f"hq/{name}.png"))
        lq = r.from_pil(Image.open(next((tmp_path / "lq").glob(f"{name}.*"))))
        expected.append(r.psnr(*map(r.to_unit, (r.upsample(lq, 4), hq))).item())
    assert float(row[2]) == pytest.approx(sum(expected) / 2, abs=0.01)
    Image.new("RGB", (20, 20)).save(tmp_path / "lq/portrait.bmp")
    done = command("gendr_pix.py", "--eval", "--run", folder, "--data", tmp_path)
    assert done.returncode == 2 and "not 1 to 4 times as large" in done.stderr
    (tmp_path / "lq/portrait.bmp").rename(tmp_path / "lq/other.bmp")
    done = command("gendr_pix.py", "--eval", "--run", folder, "--data", tmp_path)
    assert done.returncode == 2 and "alone: other, portrait" in done.stderr


def test_resshift_in_pixel_space_trains_and_restores(tmp_path):
    run = ("--tiny", "--run", tmp_path / "pixel")
    done = command("resshift.py", "--train", *run, "--space", "pixel", *SMALL,
                   "--prior-steps", 2)
    assert done.returncode == 0, done.stderr
    names = {p.name for p in (tmp_path / "pixel").iterdir()}
    assert "resshift.safetensors" in names and "vae.safetensors" not in names
    for size, tile in ((30, 0), (60, 192)):
        r.to_pil(photo(size)).save(tmp_path / "lq.png")
        done = command("gendr_pix.py", *run[1:], "--input", tmp_path / "lq.png",
                       "--output", tmp_path / f"{size}.png", "--model", "resshift",
                       "--tile", tile)
        assert done.returncode == 0, done.stderr
        assert Image.open(tmp_path / f"{size}.png").size == (4 * size, 4 * size)


def test_a_picture_goes_in_and_comes_out_four_times_larger(finished, tmp_path):
    folder, _ = finished
    lq = Image.open(HERE / "tiny_data/val/other/dahlia.png").convert("RGB")
    lq = lq.resize((45, 37))
    lq.putalpha(128)
    lq.save(tmp_path / "lq.png")
    done = command("gendr_pix.py", "--run", folder, "--input", tmp_path / "lq.png",
                   "--output", tmp_path / "up.png", "--passes", 2, "--guidance", 0)
    assert done.returncode == 0, done.stderr
    up = Image.open(tmp_path / "up.png")
    assert up.size == (180, 148) and up.mode == "RGBA" and up.getpixel((5, 5))[3] == 128
    small = up.convert("RGB").resize((45, 37), Image.BOX)
    error = np.abs(np.array(small, float) - np.array(lq.convert("RGB"), float)).mean()
    assert error < 12                            # right side up, and its own colours


def test_folders_and_formats_go_in_and_come_out(finished, tmp_path, monkeypatch,
                                                capsys):
    folder, _ = finished
    (tmp_path / "in/below").mkdir(parents=True)
    lq = Image.open(HERE / "tiny_data/val/other/cat.png").convert("RGB")
    lq = lq.resize((24, 18))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lq.save(tmp_path / "in/a.png", icc_profile=profile)
    lq.convert("L").save(tmp_path / "in/b.webp", lossless=True)
    lq.convert("CMYK").save(tmp_path / "in/below/c.tif")
    lq.resize((1, 1)).save(tmp_path / "in/below/d.bmp")
    (tmp_path / "in/bad.jpg").write_bytes(b"no")
    code, out, err = here(monkeypatch, capsys, "--run", folder, "--input", tmp_path /
                          "in", "--output", tmp_path / "out", "--scale", 2)
    assert code == 1 and "1 of 5 failed" in err and "bad.jpg" in err
    up = {p.relative_to(tmp_path / "out").as_posix(): Image.open(p) for p in
          (tmp_path / "out").rglob("*.*")}
    assert {k: v.size for k, v in up.items()} == {
        "a.png": (48, 36), "b.webp": (48, 36), "below/c.tif": (48, 36),
        "below/d.bmp": (2, 2)}
    assert up["a.png"].info["icc_profile"] == profile
    a, c = (np.array(up[k].convert("RGB"), float) for k in ("a.png", "below/c.tif"))
    assert np.abs(a - c).mean() < 12
    code, _, err = here(monkeypatch, capsys, "--run", folder, "--input", tmp_path /
                        "in", "--output", tmp_path / "out", "--scale", 2)
    assert code == 2 and "--force" in err


def here(monkeypatch, capsys, *arguments, main=g.main):
    """A command in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        r.command_line(main)
    return (end.value.code or 0, *capsys.readouterr())


BAD = {                                  # arguments, after a split: what is said
    "": "nothing to do", "--no-such-flag": "--no-such-flag",
    "--train --tiny --full": "not allowed with", "--train --tiny --steps 1": "steps",
    "--train --tiny --eta-1 2": "eta_1", "--train --tiny --kappa 0": "kappa",
    "--train --tiny --head-width 7": "head_width", "--train --tiny --batch 0": "batch",
    "--train --tiny --unet-widths 50 60": "unet_widths", "--train --tiny --pool -1":
    "pool", "--train --tiny --learning-rate nan": "finite", "--train --tiny --clip 0":
    "clip", "--train --tiny --learning-rate -1": "learning_rate",
    "--train --tiny --lora-rank 0": "lora_rank", "--train --tiny --scale 0": "scale",
    "--train --tiny --unet-weights none.safetensors": "no such file",
    "--train --tiny --lpips-net foo": "invalid choice", "--train --tiny --vae-steps -1":
    "vae_steps", "--train --tiny --crop 100": "crop", "--train --tiny --distill magic":
    "invalid choice", "--train --tiny --vae-widths 8 8": "four levels",
    "--train --tiny --train-data EMPTY": "no pictures", "--train --tiny --train-data "
    "THUMBS": "no picture has a", "--train --tiny --space pixel": "latent space",
    "--train --tiny --ema 1": "ema", "--train --tiny --negative 2": "negative",
    "--train --tiny --data THUMBS": "not use --data", "--eval --run NONE": "train",
    "--eval --run RUN --ranges mild": "not use --ranges", "--bench --tiny --size 20":
    "multiple of 8", "--bench --tiny --run RUN": "not use --run",
    "--exact --tiny --seed 3": "not use --seed", "--eval --run RUN --data THUMBS":
    "smaller than", "--eval --run BROKEN": "not the settings", "--eval --run LIST":
    "not the settings", "--ablate --run NONE": "train first",
    "--ablate --run RUN --row nonsense": "none of",
    "--ablate --run RUN --ablate-steps 0": "1 or more",
    "--input TEXT --run RUN --output NEW.png": "not a readable picture",
    "--input CUT --run RUN --output NEW.png": "not a readable picture",
    "--input NOTHING.png --run RUN --output NEW.png": "no such file",
    "--input EMPTY --run RUN --output NEW": "no pictures",
    "--input CAT --run NONE --output NEW.png": "train first",
    "--input CAT --run RUN --output NEW.psd": "not a picture format",
    "--input CAT --run RUN --output NEW.mpg": "not a picture format",
    "--input CAT --run RUN --output NEW": "not a picture format",
    "--input CAT --run RUN --output no/where.png": "no such folder",
    "--input CAT --run RUN --output OLD.png": "--force",
    "--input OLD.png --run RUN --output OLD.png --force": "is the input",
    "--input CAT --run RUN --output NEW.png --tile -5": "--tile",
    "--input CAT --run RUN --output NEW.png --tile 64": "--tile",
    "--input CAT --run RUN --output NEW.png --scale 5": "--scale",
    "--input CAT --run RUN --output NEW.png --guidance nan": "finite",
    "--input CAT --run RUN --output NEW.png --passes 3": "invalid choice",
    "--input CAT --run RUN --output NEW.png --passes 1 --guidance 2": "--guidance",
    "--input CAT --run RUN --output NEW.png --model gendr --passes 4": "--passes",
    "--input CAT --run RUN --output NEW.png --model resshift --passes 2": "--passes",
    "--input CAT --tiny --run RUN --output NEW.png": "not use --tiny",
    "--input PHOTOS --run RUN --output PHOTOS/up": "inside",
    "--eval --run RUN --data PHOTOS --size 64": "not use --size",
    "--train --tiny --repeated": "--no-least-squares",
    "--train --tiny --val-data TWICE": "two pictures of one name",
    "--input CAT --run RUN --output NEW.png --degradation 2 1": "--degradation",
    "--input CAT --run RUN --output NEW.png --device cuda": "there is none",
    "--input CAT --run NAN --output NEW.png": "not finite",
    "--input CAT --run SHORT --output NEW.png": "not a weights file"}


def test_help_answers_in_a_second_and_names_every_flag():
    for script in ("gendr_pix.py", "resshift.py"):
        started = time.perf_counter()
        done = command(script, "--help")
        assert done.returncode == 0 and time.perf_counter() - started < 1
        flags = {f.strip("-").replace("-", "_") for f in
                 re.findall(r"--[a-z][A-Za-z0-9_-]*", done.stdout)}
        assert set(r.TABLE) | {"tiny", "full", "run", "device", "exact"} <= flags
    assert done.stdout.startswith("usage: resshift.py")


def test_bad_input_gets_one_line_and_exit_code_2(finished, tmp_path, monkeypatch,
                                                 capsys, in_project):
    names = {k: tmp_path / k for k in (
        "NONE", "THUMBS", "EMPTY", "NAN", "SHORT", "BROKEN", "LIST", "NEW", "TEXT",
        "TWICE", "CUT", "NEW.png", "NEW.psd", "NEW.mpg", "OLD.png")}
    names |= {"RUN": finished[0], "CAT": HERE / "tiny_data/val/other/cat.png"}
    names["PHOTOS"] = HERE / "tiny_data/val"
    names["PHOTOS/up"] = names["PHOTOS"] / "up"
    for name in ("THUMBS", "EMPTY", "BROKEN", "LIST", "TWICE"):
        names[name].mkdir()
    (names["BROKEN"] / "config.json").write_text('{"seed": ')
    (names["LIST"] / "config.json").write_text("[]")
    for name in ("NAN", "SHORT"):
        shutil.copytree(names["RUN"], names[name])
    file = names["NAN"] / "pix.safetensors"
    state = load_file(file)
    r.save_weights({k: v * math.nan for k, v in state.items()}, file)
    file = names["SHORT"] / "vae.safetensors"
    file.write_bytes(file.read_bytes()[:999])
    Image.new("RGB", (20, 20)).save(names["THUMBS"] / "a.png")
    for kind in ("png", "jpg"):
        Image.new("RGB", (64, 64)).save(names["TWICE"] / f"a.{kind}")
    Image.new("RGB", (20, 20)).save(names["OLD.png"])
    names["TEXT"].write_text("not a picture")
    names["CUT"].write_bytes(names["CAT"].read_bytes()[:2000])
    before = sorted(tmp_path.rglob("*")) + sorted(HERE.iterdir())
    for line, reason in BAD.items():
        arguments = [names.get(word, word) for word in line.split()]
        if "--train" in line:
            arguments += ["--run", names["NONE"]]
        code, _, error = here(monkeypatch, capsys, *arguments)
        assert code == 2 and reason in error, (line, error)
        assert error.startswith("error: ") and error.count("\n") == 1, (line, error)
        assert sorted(tmp_path.rglob("*")) + sorted(HERE.iterdir()) == before, line
    assert len(BAD) >= 40


def test_a_full_disk_is_one_line_and_the_last_good_file_stays(tmp_path, monkeypatch,
                                                              capsys):
    """A file size limit in place of a full disk: both are an OSError of write."""
    file, limits = tmp_path / "x.ckpt", resource.getrlimit(resource.RLIMIT_FSIZE)
    r.write_file(file, b"good")

    def main():
        r.write_file(file, bytes(10_000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        code, _, error = here(monkeypatch, capsys, main=main)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and error.count("\n") == 1
    assert file.read_bytes() == b"good" and list(tmp_path.iterdir()) == [file]


def test_a_full_tmpfs_is_one_line_and_the_last_good_file_stays(tmp_path):
    script = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import resshift as r
r.write_file("disk/x.ckpt", b"good")
try:
    r.command_line(lambda: r.write_file("disk/x.ckpt", bytes(10 ** 6)))
finally:
    print([(p.name, p.read_bytes()) for p in r.Path("disk").iterdir()])
"""
    (tmp_path / "disk").mkdir()
    mount = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=64k none disk && $0 "
             "\"$@\""]
    if not shutil.which("unshare") or subprocess.run(
            [*mount, "true"], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("no user namespaces")
    done = subprocess.run([*mount, sys.executable, "-c", script], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.strip() == "[('x.ckpt', b'good')]"
    assert "No space left" in done.stderr and done.stderr.count("\n") == 1


def weights(folder):
    return {p.name: p.read_bytes() for p in Path(folder).glob("*.safetensors")}


def killed_and_resumed(folder, kills, dice):
    """A cut-down --train --tiny, killed `kills` times at random moments and resumed:
    its weights, {name: bytes}."""
    words = [sys.executable, "gendr_pix.py", *CUT, "--save-every", 1, "--run", folder]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_HOME": "/nonexistent",
                        "https_proxy": "http://127.0.0.1:9"}
    killed = []
    for _ in range(kills):
        run = subprocess.Popen([*map(str, words)], cwd=HERE, env=env,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            run.wait(dice.uniform(3, 13))
        except subprocess.TimeoutExpired:
            run.kill()                                       # SIGKILL
            killed.append(run.wait())
    assert len(killed) >= kills / 2          # the others came after the run's end
    done = command("gendr_pix.py", *words[2:])
    assert done.returncode in (0, 1), done.stderr
    return weights(folder)


def test_a_run_killed_and_resumed_ends_with_the_same_weights(finished, tmp_path):
    whole = weights(finished[0])
    assert len(whole) == len(g.CHAPTERS)
    assert killed_and_resumed(tmp_path / "run", 1, random.Random(0)) == whole


def test_the_scripts_keep_their_shape():
    """88 columns, functions of 50 lines; the budget of 2,600 lines is not met yet."""
    for name in ("resshift.py", "gendr_pix.py"):
        text = (HERE / name).read_text()
        assert max(map(len, text.splitlines())) <= 88
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, node.name


@pytest.mark.xfail(strict=True, reason="the budget is missed, by about 770 lines")
def test_the_line_budget():
    lines = [len((HERE / name).read_text().splitlines()) for name in
             ("resshift.py", "gendr_pix.py")]
    assert sum(lines) <= 2600 and max(lines) <= 1350


def test_the_readmes_table_is_the_expected_runs():
    metrics = json.loads((HERE / "tiny_data/expected/metrics.json").read_text())
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in
             (HERE / "README.md").read_text().splitlines() if line.startswith("| ")]
    head = next(i for i, line in enumerate(lines) if line[1:2] == ["PSNR"])
    keys = ("psnr", "lpips", "spectral", "lattice", "ms")
    for line in lines[head + 1:head + 7]:
        row = metrics["table"][line[0]]
        for key, cell in zip(keys, line[1:]):
            digits = len(cell.partition(".")[2])
            assert cell == f"{row[key]:.{digits}f}", (line[0], key)
    assert all(check["floor"] for check in metrics["checks"].values())       # PASS


def answer(number):
    """The numbers in the README's answer to an exercise, as written."""
    text = (HERE / "README.md").read_text().partition("## Answers")[2]
    text = text.partition(f" {number + 1}. ")[0].rpartition(f"{number}. ")[2]
    return re.findall(r"\d*\.\d+|\d+", text)


def test_the_answers_of_the_exercises_in_the_exact_world():
    """Their solutions: samplers on 2,000 photographs, the mean over 3 seeds."""
    world = r.ExactWorld()

    def measured(chain, sampler):
        rows = []
        for seed in range(3):
            generator = rng(seed)
            x0, y0 = world.draw(2000, generator)
            x = sampler(chain, lambda x, y, t: world.denoise(y, chain, x, t), y0,
                        generator)
            rows.append(r.exact_measures(world, x, x0, y0))
        return r.means(rows)

    def from_y0(chain, model, y0, generator):                # 3: no noise at x_T
        chain.prior_sample = lambda y0, noise: y0
        return chain.sample(model, y0, generator)

    def sinsr(chain, model, y0, generator):                  # 4: no noise at all
        x = chain.prior_sample(y0, r.noise_like(y0, generator))
        for t in range(chain.steps, 0, -1):
            m = (chain.eta[t - 1] / chain.eta[t]).sqrt()
            j = chain.eta[t - 1] - (chain.eta[t - 1] * chain.eta[t]).sqrt()
            x = (1 - m - j) * model(x, y0, torch.full((len(x),), t)) + m * x + j * y0
        return x

    def stride(chain, model, y0, generator, step=5):         # 5: t to t - step
        x = chain.prior_sample(y0, r.noise_like(y0, generator))
        for t in range(chain.steps, 0, -step):
            s, e = chain.eta[t - step], chain.eta[t]
            x = s / e * x + (1 - s / e) * model(x, y0, torch.full((len(x),), t))
            x = x + chain.kappa * (s / e * (e - s)).sqrt() * r.noise_like(y0, generator)
        return x
    plain, chain = r.ResidualShift.sample, r.ResidualShift
    normal, four, three = (measured(chain(n), plain) for n in (15, 4, 3))
    one, two, no_noise, straight, strides = (measured(*how) for how in (
        (chain(15, 1.0), plain), (chain(15, eta_1=0.6), plain), (chain(15), from_y0),
        (chain(4), sinsr), (chain(15), stride)))
    for number, values in {
            1: (one["distance"], normal["distance"], one["mse"], normal["mse"]),
            2: (two["mse"], two["distance"]), 3: (no_noise["distance"],),
            4: (straight["distance"], four["distance"], straight["energy"],
                four["energy"]),
            5: (strides["mse"], strides["distance"], three["mse"], three["distance"],
                strides["energy"], three["energy"])}.items():
        for text, value in zip(answer(number), values, strict=True):
            digits = len(text.partition(".")[2])
            assert abs(float(text) - value) < 1.5 * 10 ** -digits, (number, text, value)


def test_the_readmes_sizes_of_the_networks():
    sizes = next(line for line in (HERE / "README.md").read_text().splitlines() if
                 line.startswith("| GenDR-Pix's U-Net"))
    for name, cell in zip(r.PRESETS, re.findall(r"([0-9.]+) M", sizes), strict=True):
        with torch.device("meta"):
            unet = r.UNet(r.preset(name), 192, 192)
        digits = len(cell.partition(".")[2])
        assert f"{sum(p.numel() for p in unet.parameters()) / 1e6:.{digits}f}" == cell


def test_the_readmes_golden_number(capsys):
    """The code block of the README prints the number that stands behind it."""
    text = (HERE / "README.md").read_text()
    block = text[text.index("    import torch, resshift as r"):].split("\n\n")[0]
    exec("\n".join(line[4:] for line in block.splitlines()), {})
    assert capsys.readouterr().out.strip() == block.rpartition("# ")[2].strip()


def test_the_readme_is_short_and_names_what_exists():
    text = (HERE / "README.md").read_text()
    assert sum(any(map(str.isalnum, word)) for word in text.split()) <= 2500
    tests = (HERE / "test_gendr_pix.py").read_text()
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
    for name in re.findall(r"\]\((tiny_data/[^)]*)\)", text):
        assert (HERE / name).is_file(), name
    for flags in re.findall(r"python gendr_pix\.py ([^`#\n]*)", text):
        for flag in re.findall(r"--([a-z-]+)", flags):
            key = flag.replace("-", "_")
            assert key in {*r.TABLE, *g.COMMANDS, *g.FLAGS, "tiny", "full", "run"}, flag


def readme_commands():
    """Every command line in the README's code, without `pip install ... &&`."""
    code = re.findall(r"`([^`\n]+)`|^    (.*)$", (HERE / "README.md").read_text(), re.M)
    lines = {("".join(two)).partition("#")[0].split("&& ")[-1].strip() for two in code}
    flags = "|".join(g.COMMANDS)
    return sorted({re.sub("^--", "python gendr_pix.py --", re.sub(
        r"^(?=\w+\.py)", "python ", line)) for line in lines if re.search(
            rf"--({flags})\b|^python ", line)})


CI = {"python gendr_pix.py --train --tiny", "python -m pytest -q"}      # in .ci/run
HAND = "python test_gendr_pix.py"        # 20 kills; the suite has one


def test_every_command_of_the_readme_runs(finished, tmp_path, monkeypatch, capsys):
    """In an empty folder with a finished run; steps, networks and pictures are cut."""
    lines = readme_commands()
    assert CI <= set(lines) and HAND in lines and len(lines) > 12
    assert all(line in (HERE / ".ci/run").read_text() for line in CI)
    shutil.copytree(finished[0], tmp_path / "runs/tiny")
    monkeypatch.chdir(tmp_path)
    cat = Image.open(HERE / "tiny_data/val/other/cat.png").convert("RGB")
    for file, size in {"photo.jpg": (24, 20), "photos/a.png": (24, 20), "photos/b.jpg":
                       (24, 20), "DIR/a.png": (80, 80), "DIR2/a.png": (64, 64),
                       "tiny_data/val/other/a.png": (64, 64)}.items():
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        cat.resize(size).save(file)
    (tmp_path / "tiny_data/train").symlink_to(HERE / "tiny_data/train")
    no_backbone(monkeypatch)
    monkeypatch.setattr(g.exact_generator, "__defaults__", (2, 8))
    monkeypatch.setattr(r.exact_table, "__defaults__", ((), 1, 50))
    monkeypatch.setattr(g.ablate, "__defaults__", ("", 1))   # one seed
    monkeypatch.setattr(r.Run, "lock", lambda self: None)    # parts twice in a process
    less = [w for w in map(str, CUT) if w not in ("--train", "--tiny")]
    size = less.index("--size")
    chain = less[:size] + less[size + 2:] + ["--prior-steps", "1"]
    for line in set(lines) - CI - {HAND}:
        words = shlex.split(line)
        script = words.index(next(w for w in words if w.endswith(".py")))
        name, words = words[script], words[script + 1:]
        if "--train" in words:           # the README's own flags come last, and win
            words = (less if name == "gendr_pix.py" else chain) + words
        if "--val-data" in line:
            words += ["--workers", "0", "--run", "runs/own", "--lpips-net", "alex"]
        if "--eval" in words:
            words += ["--size", "64"]
        if "--ablate" in words:
            words += ["--ablate-steps", "1", *(() if "--row" in words else (
                "--row", "no critic"))]
        with monkeypatch.context() as patch, torch.device(
                "meta" if "--bench" in words else "cpu"):
            if "--full" in words:        # counted whole; neither timed nor trained
                patch.setattr(g, "benchmark", lambda *_: {})
                patch.setattr(g, "all_chapters", lambda *_: sys.exit(0))
            code, out, error = here(patch, capsys, *words, main={
                "gendr_pix.py": g.main, "resshift.py": r.main}[name])
        told = code == 1 and out.splitlines()[-1].startswith("FAIL")
        assert code == 0 or told, (line, error)
    assert Image.open("up.png").size == (96, 80)
    assert Image.open("restored/b.jpg").size == (48, 40)
    for file in ("exact.png", "one_step.png", "runs/own/pix.safetensors",
                 "runs/pixel/resshift.safetensors"):
        assert Path(file).is_file(), file


def test_importing_does_nothing_visible(tmp_path):
    done = command("-c", f"import sys; sys.path.insert(0, {str(HERE)!r}); "
                   "import gendr_pix", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "" and not list(tmp_path.iterdir())


if __name__ == "__main__" and sys.argv[1:]:      # for the test of two processes
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.distributed.init_process_group("gloo")
    train_every_stage(sys.argv[1], int(sys.argv[2]))
    if r.rank_and_size()[1] > 1:
        torch.distributed.destroy_process_group()
elif __name__ == "__main__":             # by hand: 20 kills, about 6 minutes
    with tempfile.TemporaryDirectory() as folder:
        assert killed_and_resumed(f"{folder}/a", 0, None) == killed_and_resumed(
            f"{folder}/b", 20, random.Random())
        print("20 kills: bit-identical weights")
