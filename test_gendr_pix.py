"""Tests of resshift.py and gendr_pix.py, in the order of the files.

Every test compares with an oracle: a closed form, Bayes' rule, another implementation,
or a case worked by hand.  No GPU, no downloads:  python -m pytest -q
"""
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import gendr_pix as g
import resshift as r

os.environ["CUDA_VISIBLE_DEVICES"] = ""                   # the tests are the CPU's
HERE = Path(__file__).parent
MICRO = dataclasses.replace(
    r.preset("tiny"), crop=32, pool=4, batch=4, steps=4, unet_widths=(16, 32),
    head_width=16, groups=8, context_tokens=2, context_width=8,
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
        x_t = chain.q_sample(x0, x0, t, noise) * chain.input_scale(t, x0)
        assert abs(x_t.std().item() - 1) < 0.01


def test_bad_schedules_are_refused():
    for bad in (dict(steps=1), dict(eta_1=0.5, eta_T=0.4), dict(eta_T=1.5)):
        with pytest.raises(ValueError):
            r.ResidualShift(**bad)


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
    rows = g.counts(r.preset("full"), (512, 512))
    pix, gendr = rows["GenDR-Pix"], rows["GenDR"]
    assert round(pix["macs"] / 1e9, 1) == 343.5          # the paper: 344 and 744
    assert round(pix["guided"] / 1e9, 1) == 743.3
    assert round(gendr["macs"] / 1e9) == 1284
    assert round(gendr["guided"] / 1e9) == 1624
    prompts = 2 * 77 * 1024                              # learned, beside the U-Net
    assert round((pix["parameters"] - prompts) / 1e6, 2) == 866.99


def test_sizes_on_the_command_line():
    assert g.output_size("512") == (512, 512)
    assert g.output_size("3840x2160") == (2160, 3840)            # height first
    for bad in ("a", "512x512x8", "100", "8"):
        with pytest.raises(r.UserError):
            g.output_size(bad)


def test_macs_by_hand():
    conv, linear = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(6, 7)
    assert g.macs(lambda: conv(randn(2, 3, 4, 8))) == 2 * 4 * 8 * 3 * 5 * 9
    assert g.macs(lambda: linear(randn(10, 6))) == 10 * 6 * 7
    q = torch.empty(1, 2, 9, 4, device="meta")

    def attend():
        return F.scaled_dot_product_attention(q, q, q)
    assert g.macs(attend) == 2 * 2 * 9 * 9 * 4 and g.macs(attend, False) == 0


class Latents:
    """A pool whose HQ latents have variances 1, 4, 9, 16 in four of 16 channels."""

    def __init__(self):
        self.std, z = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(64, 16, 8, 8)
        v = randn(4, 64 * 64)
        v = v - v.mean(1, keepdim=True)
        white = torch.linalg.solve(torch.linalg.cholesky(torch.cov(v)), v)
        z[:, :4] = (self.std[:, None] * white).reshape(4, 64, 8, 8).transpose(0, 1)
        self.z = z

    def __len__(self):
        return 64

    def rows(self, index):
        return {"z_hq": self.z[index]}


def diffusers_unet(cfg, channels):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    return wake(diffusers.UNet2DConditionModel(
        in_channels=channels, out_channels=channels, block_out_channels=cfg.unet_widths,
        norm_num_groups=cfg.groups, cross_attention_dim=cfg.context_width,
        layers_per_block=cfg.unet_blocks, use_linear_projection=True,
        attention_head_dim=tuple(w // cfg.head_width for w in cfg.unet_widths),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))).eval()


def test_stable_diffusion_weights_start_the_prior(tmp_path, capsys):
    cfg = dataclasses.replace(MICRO, shortcut=False, kappa=1.0)
    pool, t, file = Latents(), torch.tensor([4, 2]), tmp_path / "unet.safetensors"
    for channels in (16, 4):
        theirs, prior = diffusers_unet(cfg, channels), r.ResShift(cfg)
        r.save_weights(theirs, file)
        r.start_from_stable_diffusion(prior, file, pool)
        x_t, y0 = randn(2, 16, 8, 8), pool.z[:2]

        def unet(x):
            context = prior.prompts(r.POSITIVE, 2)
            return theirs(x, prior.unet_time(t), context).sample
        with torch.no_grad():
            out = prior(x_t, y0, t)                  # x_t's half starts at zero
            if channels == 16:
                close(out, unet(y0), 1e-5)
                continue
            # the axes are the first four channels, each with a sign of its own
            w = theirs.conv_in.weight
            ours = prior.unet.conv_in.weight[:, 16:20]
            std = pool.std.view(4, 1, 1)
            sign = (ours * w).sum((0, 2, 3)).sign().view(4, 1, 1)
            close(out[:, :4], std * sign * unet(sign / std * y0[:, :4]), 1e-3)
            close(out[:, 4:], torch.zeros(2, 12, 8, 8), 1e-3)
    assert "4 channels replaced by 16, least-squares start" in capsys.readouterr().out
    state = r.load_file(file)
    state["mid_block.resnets.0.conv1.weight"] = torch.zeros(1)
    r.save_file(state, file)
    with pytest.raises(r.UserError, match="mid_block.resnets.0.conv1.weight is"):
        r.start_from_stable_diffusion(r.ResShift(cfg), file, pool)
    r.save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(r.UserError, match="not a UNet2DConditionModel"):
        r.start_from_stable_diffusion(r.ResShift(cfg), file, pool)


def test_an_autoencoders_file_gives_its_widths_and_weights(tmp_path, in_project):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    theirs = wake(diffusers.AutoencoderKL(
        latent_channels=12, block_out_channels=(8, 8, 12, 16), layers_per_block=2,
        norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4)).eval()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file, state = tmp_path / "vae.safetensors", theirs.state_dict()
    for names in ({}, old):                          # today's names, and older files'
        renamed = {}
        for key, value in state.items():
            for new, name in names.items():
                key = key.replace(new, name)
            renamed[key] = value
        r.save_file(renamed, file)
        cfg = r.with_shapes_of(MICRO, file)
        assert cfg.vae_groups == 32                  # diffusers' default; here it is 4
        cfg = dataclasses.replace(cfg, vae_groups=4)
        assert (cfg.vae_widths, cfg.vae_blocks) == ((8, 8, 12, 16), 2)
        assert cfg.latent_channels == 12 and not cfg.vae_skip
        run = r.Run(tmp_path / f"run{len(names)}",
                    dataclasses.replace(cfg, vae_weights=str(file)))
        vae, pool = r.VAE(run.cfg), r.Pool(run.cfg)
        r.train_vae(run, vae, pool)
        hq = pool.rows(torch.arange(4))["hq"]
        with torch.no_grad():
            z = theirs.encode(hq).latent_dist.mean
            close(vae.encode(hq), z / z.std(), 1e-4)
            close(vae.decode(vae.encode(hq)), theirs.decode(z).sample, 1e-4)
    del renamed["decoder.conv_out.bias"]
    r.save_file(renamed, file)
    with pytest.raises(r.UserError, match="decoder.conv_out.bias is not in the file"):
        r.train_vae(run, r.VAE(run.cfg), pool)


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


def test_vae_starts_as_the_linear_autoencoder_and_never_samples():
    vae = r.VAE(MICRO)
    flat = randn(16, 3, 1, 1).expand(-1, -1, 16, 16).contiguous()   # rank 3: exact
    vae.start_from_pca(flat)
    z = vae.encode(flat)
    assert z.shape == (16, 16, 2, 2) and torch.equal(z, vae.encode(flat))
    close(vae.decode(z), flat, 1e-3)


# ---- resshift.py, 5: the degradation -------------------------------------------------


def photo(n=64):
    return r.read_picture(HERE / "tiny_data/val/cat_eyes.png")[:, :, :n, :n]


def test_degradation_repeats_under_its_generator():
    (a, sa), (b, sb), (c, _) = (r.degrade(photo(), MICRO, rng(s)) for s in (1, 1, 2))
    assert a.shape == (1, 3, 16, 16) and sa.shape == (1, 2)
    assert torch.equal(a, b) and torch.equal(sa, sb) and not torch.equal(a, c)
    levels = (a + 1) * 127.5
    close(levels, levels.round(), 1e-4)                             # 8-bit levels


def mean_scores(monkeypatch, **ranges):
    base = dataclasses.replace(r.RANGES["mild"], **ranges)
    monkeypatch.setitem(r.RANGES, "mild", base)
    cfg = dataclasses.replace(MICRO, ranges="mild")
    scores = [r.degrade(photo(), cfg, rng(s))[1] for s in range(12)]
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
    k = r.gaussian_kernel(21, 1.5, 1.5, 0.0, "iso", 1.0)
    x2 = (torch.arange(21) - 10).float() ** 2
    close(k.sum(), torch.tensor(1.0), 1e-5)
    close((k.sum(0) * x2).sum(), torch.tensor(1.5 ** 2), 1e-3)
    k = r.sinc_kernel(21, math.pi / 2)
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
    grey = (r.read_picture(tmp_path / "grey.png") + 1) * 127.5
    close(grey[0, 0], torch.from_numpy(ramp).float(), 1e-4)
    assert torch.equal(r.read_picture(tmp_path / "deep.png"),
                       r.read_picture(tmp_path / "grey.png"))
    assert r.read_picture(tmp_path / "p.png").shape == (1, 3, 8, 8)
    assert r.open_picture(tmp_path / "alpha.png").mode == "RGBA"
    assert r.open_picture(tmp_path / "turned.png").size == (4, 8)
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    for name in ("bad.png", "missing.png"):
        with pytest.raises(r.UserError, match=name):
            r.read_picture(tmp_path / name)


def test_upsampling_keeps_the_centre_and_equals_pillows():
    x = torch.rand(1, 1, 8, 8, generator=rng()) * 2 - 1
    theirs = Image.fromarray(x[0, 0].numpy()).resize((32, 32), Image.BICUBIC)
    ours = r.upsample(x.expand(-1, 3, -1, -1), 4)
    close(ours[0, 1], torch.from_numpy(np.array(theirs)).clamp(-1, 1), 1e-5)
    symmetric = x + x.flip(2, 3)
    up = r.upsample(symmetric.expand(-1, 3, -1, -1) / 2, 4)
    close(up, up.flip(2, 3), 1e-5)                                  # no sub-pixel shift


def no_backbone(monkeypatch):
    real = r.lpips.LPIPS

    def offline(*args, **kwargs):
        if not kwargs.get("pnet_rand"):
            raise OSError("no network")
        return real(*args, **kwargs)
    monkeypatch.setattr(r.lpips, "LPIPS", offline)


def test_lpips_without_its_backbone_says_so_and_repeats(monkeypatch, capsys):
    no_backbone(monkeypatch)
    state = torch.get_rng_state()
    a, b = r.Perceptual("alex"), r.Perceptual("alex")
    assert torch.equal(state, torch.get_rng_state())
    assert a.name == "LPIPS (random features)" and "alexnet" in capsys.readouterr().out
    x, y = randn(1, 3, 64, 64).clamp(-1, 1), randn(1, 3, 64, 64, seed=1).clamp(-1, 1)
    assert a(x, x).item() == 0 and a(x, y).item() > 0
    assert torch.equal(a(x, y), b(x, y))


def test_the_chains_figure_draws_without_training(tmp_path):
    pair = r.Held("a", photo(64), r.degrade(photo(64), MICRO, rng())[0], None)
    r.draw_chain(pair, MICRO, tmp_path / "chain.png")
    array = np.array(Image.open(tmp_path / "chain.png").convert("RGB"))
    assert array.shape[1] > 800 and array.std() > 20         # not an empty page


# ---- resshift.py, 7 and 8: pairs and the training loop -------------------------------


def world(tmp_path, cfg=MICRO, frozen=True):
    """A run, its pool, and an untrained but awake end and prior."""
    run, pool = r.Run(tmp_path / "run", cfg), r.Pool(cfg)
    vae, prior = r.VAE(cfg), r.ResShift(cfg)
    vae.start_from_pca(pool.rows(torch.arange(4))["hq"])
    vae.requires_grad_(False)
    if frozen:
        prior.requires_grad_(False)
    pool.add("z_hq", lambda rows: vae.encode(rows["hq"]))
    pool.add("z_lq", lambda rows: vae.encode(rows["lq_up"]))
    pool.columns["estimate"] = pool.columns["scores"]
    return run, pool, vae, prior


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
        MICRO, vae_steps=steps, prior_steps=steps, estimator_steps=steps,
        gendr_steps=steps, adc_steps=steps, pix_steps=steps, negative=0.0, log_every=5,
        save_every=1000, learning_rate=5e-3, gendr_learning_rate=5e-3,
        student_learning_rate=3e-3, vae_learning_rate=3e-3, ema=0.5)
    run, pool, vae, prior = world(tmp_path, cfg, stage != "resshift")
    play_stage(stage, run, pool, vae, prior)
    first, last = first_and_last(run, stage, loss)
    assert last < factor * first


def play_stage(stage, run, pool, vae, prior, at_start=lambda model: None):
    """Train one stage on what the stages before it would hand over; its model."""
    cfg = run.cfg
    if stage == "vae":
        model = r.VAE(cfg)
        at_start(model)
        r.train_vae(run, model, pool)
        return model

    def taught(model, turns, steps):
        at_start(model)
        r.train(run, stage, turns, pool, steps)
        return model
    if stage == "resshift":
        return taught(prior, r.prior_turns(prior, cfg), cfg.prior_steps)
    if stage == "estimator":
        model = g.DegradationEstimator(cfg)
        return taught(model, g.estimator_turns(model, cfg), cfg.estimator_steps)
    gendr = g.gendr_from_prior(prior, vae, cfg)
    if stage == "gendr":
        return taught(gendr, g.gendr_turns(prior, gendr, cfg), cfg.gendr_steps)
    gendr.requires_grad_(False)
    pool.columns["z_tea"] = pool.columns["z_hq"]
    adc = g.pixel_input(gendr, cfg, pool.rows(torch.arange(4)))
    if stage == "adc":
        return taught(adc, g.adc_turns(gendr, adc, cfg), cfg.adc_steps)
    adc.requires_grad_(False)
    pool.add("y_tea", lambda rows: rows["hq"])
    pix = g.pixel_output(adc, cfg, pool.rows(torch.arange(4)))
    turns = g.pix_turns(adc, pix, r.Perceptual("alex"), cfg)
    return taught(pix, turns, cfg.pix_steps)


@pytest.mark.parametrize("stage", ["vae", "resshift", "estimator", "gendr", "adc",
                                   "pix"])
def test_a_killed_stage_resumes_bit_for_bit(stage, tmp_path, in_project, monkeypatch):
    no_backbone(monkeypatch)
    cfg = dataclasses.replace(MICRO, vae_steps=5, prior_steps=5, gendr_steps=5,
                              estimator_steps=5, adc_steps=5, pix_steps=5)

    def trained(folder, kill_at=None):
        torch.manual_seed(1)
        run, pool, vae, prior = world(folder, cfg, stage != "resshift")
        if kill_at:
            batch, calls = pool.batch, []

            def dying(generator):
                calls.append(1)
                if len(calls) > kill_at:
                    raise KeyboardInterrupt
                return batch(generator)
            pool.batch = dying
        model = play_stage(stage, run, pool, vae, prior)
        return model.state_dict()
    whole = trained(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "b", kill_at=3)
    assert (tmp_path / f"b/run/{stage}.ckpt").exists()
    resumed = trained(tmp_path / "b")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_in_a_turn_only_its_player_gets_gradients(tmp_path, in_project):
    run, pool, _, _ = world(tmp_path)
    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    b.bias.requires_grad_(False)
    seen = []

    def losses(name):
        def run_both(batch, draw):
            seen.append((name, a.weight.grad is None, b.weight.grad is None,
                         a.weight.requires_grad, b.weight.requires_grad))
            return {name: b(a(torch.ones(1, 1))).sum()}
        return run_both
    r.train(run, "s", [r.Turn("a", a, losses("a"), 1e-3),
                       r.Turn("b", b, losses("b"), 1e-3, times=2)], pool, 1)
    # a plays once, then b twice; a's turn left nothing in b, and b is not a's player
    assert seen == [("a", True, True, True, False), ("b", False, True, False, True),
                    ("b", False, False, False, True)]
    assert a.bias.requires_grad and not b.bias.requires_grad


def test_parts_of_a_run_start_alike_under_one_seed(tmp_path, in_project):
    run, pool, vae, _ = world(tmp_path)
    draws = []

    def build():
        draws.append(torch.rand(3))
        return r.ResShift(MICRO)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        part = run.part(name, seed=seed, kappa=0.5)
        r.chapter(part, "resshift", build, lambda m: None)
        assert part.cfg.kappa == 0.5 and (part.folder / "resshift.safetensors").exists()
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_checkpointing_changes_memory_and_nothing_else():
    cfg = dataclasses.replace(MICRO, checkpointing=True)
    plain, thrifty = wake(r.UNet(MICRO, 3, 3)), r.UNet(cfg, 3, 3)
    thrifty.load_state_dict(plain.state_dict())
    x, context, peaks = randn(1, 3, 32, 32), randn(1, 2, 8), []
    for unet in (plain, thrifty):
        with g.LiveBytes() as live:
            unet(x, torch.tensor([9]), context).square().mean().backward()
        peaks.append(live.peak)
    close(plain.conv_in.weight.grad, thrifty.conv_in.weight.grad, 1e-6)
    assert peaks[1] < 0.8 * peaks[0]


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    """All stages, adversarial ones included, by torch's DistributedDataParallel."""
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
        two, one = (r.load_file(tmp_path / name / f"{stage}.safetensors")
                    for name in ("two", "one"))
        start = r.load_file(tmp_path / "one" / f"{stage}-start.safetensors")
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
    r.join_processes()
    # Adam divides by the gradient's size, so that rounding in a gradient of nearly 0
    # moves a weight by a part of the learning rate: 3 small steps keep it under 1e-5.
    cfg = dataclasses.replace(
        MICRO, batch=batch, pool=8, vae_steps=3, prior_steps=3, gendr_steps=3,
        estimator_steps=3, adc_steps=3, pix_steps=3, save_every=2, negative=0.3,
        **{f"{k}learning_rate": 3e-4 for k in (
            "", "gendr_", "student_", "critic_", "vae_", "estimator_", "fake_")})
    for stage in STAGES:
        torch.manual_seed(1)
        run, pool, vae, prior = world(Path(folder) / stage, cfg, stage != "resshift")
        model = play_stage(stage, run, pool, vae, prior, lambda m: r.save_weights(
            m, Path(folder) / f"{stage}-start.safetensors"))
        r.save_weights(model, Path(folder) / f"{stage}.safetensors")
        if r.world()[0] == 0:
            run.lock_file.close()
    if r.world()[1] > 1:
        torch.distributed.destroy_process_group()


def test_a_loss_that_is_not_finite_stops_the_stage_by_name(tmp_path, in_project):
    run, pool, _, _ = world(tmp_path)
    model = nn.Linear(1, 1)
    turn = r.Turn("player", model, lambda b, s: {
        "fine": model.weight.sum(), "broken": model.weight.sum() / 0 * 0}, 1e-3)
    with pytest.raises(FloatingPointError, match="player.*broken"):
        r.train(run, "stage", [turn], pool, 1)


def test_a_run_refuses_other_settings_and_a_second_process(tmp_path):
    r.Run(tmp_path, MICRO).lock_file.close()
    with pytest.raises(r.UserError, match="another crop"):
        r.Run(tmp_path, dataclasses.replace(MICRO, crop=64))
    first = r.Run(tmp_path / "two", MICRO)
    with pytest.raises(r.UserError, match="another process"):
        r.Run(tmp_path / "two", MICRO)
    first.lock_file.close()


def test_weights_files_are_checked(tmp_path):
    model, file = nn.Linear(2, 3), tmp_path / "w.safetensors"
    r.save_weights(model, file)
    twin = r.load_weights(nn.Linear(2, 3), file)
    assert torch.equal(twin.weight, model.weight)
    with pytest.raises(r.UserError, match=r"weight is \(3, 2\), not \(4, 2\)"):
        r.load_weights(nn.Linear(2, 4), file)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(r.UserError, match="not a weights file"):
        r.load_weights(nn.Linear(2, 3), file)


# ---- gendr_pix.py, 1 and 2: scores and LoRA ------------------------------------------


def awake_restorer(cfg=MICRO, seed=0):
    """A GenDR whose prior, LoRA and prompts all have random weights."""
    torch.manual_seed(seed)
    prior, vae = wake(r.ResShift(cfg)).requires_grad_(False), r.VAE(cfg)
    vae.start_from_pca(randn(8, 3, 32, 32))
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
        g.fold(model, scores)
        folded = model(x, torch.zeros(1, 2))                        # scores are in W'
        g.unfold(model)
        other = model(x, torch.tensor([[0.9, 0.1]]))
    close(folded, y, 1e-4)
    assert not torch.allclose(other, y, atol=1e-3)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    bare = g.without_lora(model)
    assert not g.lora_layers(bare)
    for layer in g.lora_layers(model.unet):
        nn.init.zeros_(layer.B.weight)
    with torch.no_grad():
        close(bare(x, scores), model(x, scores), 1e-5)
    with pytest.raises(ValueError):
        g.fold(model, torch.zeros(2, 2))


def test_lora_on_the_vae_encoder_is_guided_trained_and_folded(tmp_path, in_project):
    cfg = dataclasses.replace(MICRO, vae_lora_rank=2, gendr_steps=3)
    run, pool, vae, prior = world(tmp_path, cfg)
    nn.init.normal_(vae.quant_conv.weight, std=0.1)      # else the encoder is not heard
    pool.add("z_lq", lambda rows: vae.encode(rows["lq_up"]))
    gendr, plain = (g.gendr_from_prior(prior, vae, c) for c in (cfg, MICRO))
    batch = pool.rows(torch.arange(2))
    with torch.no_grad():
        close(gendr.latent(batch), plain.latent(batch), 1e-4)       # B = 0
        decoded = gendr.end_out.decode(batch["z_hq"])
    assert max(gendr.end_lora.block_of.values()) == 5               # 4 down, mid, out
    r.train(run, "gendr", g.gendr_turns(prior, gendr, cfg), pool, 3)
    layers = g.lora_layers(gendr.end_in)
    assert all(m.B.weight.abs().sum() > 0 for m in layers)
    assert not any(m.base.weight.requires_grad for m in layers)
    scores = torch.tensor([[0.3, 0.8]])
    for layer in layers:
        nn.init.normal_(layer.B.weight, std=0.05)
    with torch.no_grad():
        close(gendr.end_out.decode(batch["z_hq"]), decoded)         # the decoder is not
        y = gendr(batch["lq_up"][:1], scores)
        g.fold(gendr, scores)
        close(gendr(batch["lq_up"][:1], torch.zeros(1, 2)), y, 1e-4)
        g.unfold(gendr)
        assert not torch.allclose(gendr(batch["lq_up"][:1], 1 - scores), y, atol=1e-4)
    file = tmp_path / "gendr.safetensors"
    r.save_weights(gendr, file)
    again = r.load_weights(g.gendr_from_prior(prior, vae, cfg), file)
    with torch.no_grad():
        close(again(batch["lq_up"][:1], scores), y, 1e-5)
    adc = g.pixel_input(gendr, cfg, batch)
    assert adc.end_lora is None and not g.lora_layers(adc.end_in)


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
    x = photo(64)
    rows = {"lq_up": x, "estimate": torch.zeros(1, 2)}
    adc = g.pixel_input(gendr, MICRO, rows)
    with torch.no_grad():
        # encode is linear here (a fresh VAE), so a linear end can match it exactly
        close(adc.shortcut(adc.end_in.encode(x)), gendr.end_in.encode(x), 2e-2)
        rows["y_tea"] = adc(x, rows["estimate"])
        pix = g.pixel_output(adc, MICRO, rows)
        rough = g.pixel_output(adc, dataclasses.replace(MICRO, least_squares=False))
        error, plain = ((m(x, rows["estimate"]) - rows["y_tea"]).square().mean()
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

    def scores(self, a, b, psi, z_h=None):
        """`Predictions` of the generator (a, b) with psi exact for another (a, b)."""
        z_g = a * self.u + b
        z_t = self.c * z_g + self.eta * self.y0 + self.n ** 0.5 * self.eps
        real, fake = (k * z_t + i for k, i in (self.exact(self.m, self.s), psi))
        z_h = torch.full_like(z_g, self.m) if z_h is None else z_h
        return g.Predictions(z_g, z_h, real, real, fake, 1.0)

    def gradient(self, loss, a, b, xi=1.2, z_h=None):
        """(dL/da, dL/db) by autograd, psi exact for (a, b) and frozen."""
        at = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (a, b)]
        loss(self.scores(*at, self.exact(b, a), z_h), xi).backward()
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


def test_score_weight_is_sids_normaliser_and_has_no_gradient():
    z, real = randn(2, 3, 4, 4).requires_grad_(True), randn(2, 3, 4, 4, seed=1)
    w = g.normaliser(z, real)
    close(w[1, 0, 0, 0], 1 / (z[1] - real[1]).abs().mean(), 1e-6)
    assert w.shape == (2, 1, 1, 1) and not w.requires_grad


def test_guided_prior_and_fake_score_are_what_they_say():
    gendr, prior = awake_restorer()
    fake = g.fake_score_from(prior, MICRO)
    z, z_h, y0 = (randn(2, 16, 4, 4, seed=s) for s in (1, 2, 3))
    cfg = dataclasses.replace(MICRO, cid_t_min=2, cid_t_max=2, cid_guidance=1.5)
    s = g.predict(prior, fake, z, z_h, y0, rng(7), cfg)
    z_t, t = g.noised(prior.chain, z, y0, rng(7), cfg)
    assert t.tolist() == [2, 2]
    negative = prior(z_t, y0, t, r.NEGATIVE)
    close(s.guided, 1.5 * s.real - 0.5 * negative, 1e-4)
    close(s.fake, s.real, 1e-5)                              # psi starts as phi
    base = fake.unet.mid_block.resnets[0].conv1.base.weight
    assert base is prior.unet.mid_block.resnets[0].conv1.weight      # one base network
    eta = prior.chain.eta[2]                                 # z_t is on the chain
    noise = (z_t - z - eta * (y0 - z)) / (cfg.kappa * eta.sqrt())
    assert abs(noise.std().item() - 1) < 0.15


def test_gradients_of_a_gendr_step_stay_where_they_belong(tmp_path, in_project):
    run, pool, vae, prior = world(tmp_path)
    wake(prior).requires_grad_(False)
    gendr = g.gendr_from_prior(prior, vae, MICRO)
    turns = {t.name: t for t in g.gendr_turns(prior, gendr, MICRO)}
    assert list(turns) == ["generator", "fake score", "discriminator"]
    own = {n: [p for p in t.module.parameters() if p.requires_grad]
           for n, t in turns.items()}
    batch = pool.rows(torch.arange(4))
    for name, turn in turns.items():
        with r.frozen([t.module for t in turns.values() if t is not turn]):
            sum(turn.losses(batch, rng()).values()).backward()
        for other, parameters in own.items():
            touched = any(p.grad is not None for p in parameters)
            assert touched == (other == name), (name, other)
        assert all(p.grad is None for p in prior.parameters())
        turn.module.zero_grad(set_to_none=True)


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
    close(g.lattice_energy(y), torch.ones(1), 1e-5)


class Blur(nn.Module):
    """A translation-equivariant stand-in for a restorer."""
    end_out = r.PixelShuffle(8)

    def guide(self, scores):
        pass

    def forward(self, x, scores, prompt=r.POSITIVE):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) + 0 * prompt


def test_pad_cfg_at_weight_one_is_the_padded_positive_branch():
    gendr, _ = awake_restorer()
    pix = g.pixel_output(g.pixel_input(gendr, MICRO), MICRO)
    wake(pix)
    x, scores = randn(1, 3, 16, 24), torch.zeros(1, 2)
    with torch.no_grad():
        y = g.pad_cfg(pix, x, scores, 1.0)
        branch = pix(F.pad(x, (4, 4, 4, 4), mode="reflect"), scores, r.POSITIVE)
        close(y, branch[:, :, 4:20, 4:28], 1e-5)
        assert not torch.allclose(y, g.pad_cfg(pix, x, scores, 1.2), atol=1e-4)


def test_pad_cfg_of_an_equivariant_model_is_the_unpadded_result():
    x = randn(1, 3, 16, 16)
    inside = (..., slice(1, -1), slice(1, -1))               # borders see the padding
    close(g.pad_cfg(Blur(), x, None, 1.3)[inside], Blur()(x, None)[inside], 1e-5)


def test_generators_adversarial_step_leaves_no_gradient_in_the_discriminator():
    gendr, _ = awake_restorer()
    critic = g.Discriminator(gendr, MICRO)
    adversary, fake = g.Adversary(critic), randn(2, 16, 4, 4).requires_grad_(True)
    with r.frozen([critic]):                                 # as `train` does
        adversary.generator_loss(fake).backward()
    assert fake.grad.abs().sum() > 0
    assert all(p.grad is None for p in critic.parameters())
    loss = adversary.discriminator_loss(randn(2, 16, 4, 4, seed=1))
    fake.grad = None
    loss.backward()
    assert fake.grad is None
    assert all(p.grad is not None for p in critic.parameters())


def test_discriminator_reads_the_end_of_every_level():
    gendr, _ = awake_restorer()
    critic, h = g.Discriminator(gendr, MICRO), randn(1, 16, 8, 8)
    shapes = [tuple(f.shape[1:]) for f in critic.features(h)]
    assert shapes == [(16, 8, 8), (32, 4, 4), (32, 4, 4)]
    seen = []
    block = critic.backbone[0].unet.down_blocks[0]
    block.attentions[-1].register_forward_hook(lambda m, x, y: seen.append(y))
    assert torch.equal(critic.features(h)[0], seen[0])


def test_adversarial_losses_are_the_softplus_formulas():
    gendr, _ = awake_restorer()
    critic = g.Discriminator(gendr, MICRO)
    adversary = g.Adversary(critic)
    fake, real = randn(2, 16, 4, 4), randn(2, 16, 4, 4, seed=1)
    expected = torch.log1p((-critic(fake)).exp()).mean()
    close(adversary.generator_loss(fake), expected, 1e-5)
    expected = torch.log1p(critic(fake).exp()).mean() + torch.log1p(
        (-critic(real)).exp()).mean()
    close(adversary.discriminator_loss(real), expected, 1e-5)


# ---- gendr_pix.py, 6 and 7: negatives, restore ---------------------------------------


def test_online_negatives_swap_prompt_and_target_together():
    batch = {"hq": torch.ones(400, 1, 1, 1), "lq": torch.zeros(400, 1, 1, 1)}
    cfg = dataclasses.replace(MICRO, negative=0.25)
    prompt, target = r.negatives(batch, "hq", "lq", rng(), cfg)
    assert torch.equal(target.flatten() == 0, prompt == r.NEGATIVE)
    assert abs((prompt == r.NEGATIVE).float().mean().item() - 0.25) < 0.07


def test_restore_keeps_any_size_and_tiles_agree_with_one_piece():
    model, estimator = Blur(), None
    model.unet = nn.Identity()
    model.unet.cfg = MICRO
    lq, scores = photo(60)[:, :, :53, :60], torch.zeros(1, 2)
    whole = g.restore(model, estimator, lq, 4, scores=scores)
    assert whole.shape == (1, 3, 212, 240)
    tiled = g.restore(model, estimator, lq, 4, tile=128, scores=scores)
    assert (whole - tiled).abs().max() < 0.05                # only near tile borders
    assert (whole - tiled).abs().mean() < 1e-3


def test_restore_does_not_shift_the_picture():
    model = Blur()
    model.unet = nn.Identity()
    model.unet.cfg = MICRO
    lq = photo(48) + photo(48).flip(2, 3)
    up = g.restore(model, None, lq / 2, 4, scores=torch.zeros(1, 2))
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
    assert torch.equal(g.score_pair("0.25,1"), torch.tensor([[0.25, 1.0]]))
    for bad in ("0.5", "a,b", "0.2,1.5"):
        with pytest.raises(r.UserError):
            g.score_pair(bad)


def test_guidance_at_weight_one_is_the_positive_branch_in_latent_space():
    gendr, _ = awake_restorer()
    x, scores = randn(1, 3, 16, 16), torch.zeros(1, 2)
    with torch.no_grad():
        close(g.guided(gendr, x, scores, 1.0), gendr(x, scores), 1e-4)


def test_spearman_and_live_bytes_by_hand():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert g.spearman(a, a ** 3) == pytest.approx(1) and g.spearman(a, -a) == \
        pytest.approx(-1)
    assert g.spearman(a, torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.8)
    tied = torch.tensor([1.0, 2.0, 2.0, 3.0])                # ranks 1, 2.5, 2.5, 4
    assert g.spearman(a, tied) == pytest.approx(4.5 / math.sqrt(5 * 4.5))
    with g.LiveBytes() as live:
        x = torch.zeros(1000)                                # 4,000 bytes
        y = x + 1                                            # 8,000 alive
        del x
        z = y * 2                                            # 8,000 again
        z += 1                                               # in place: nothing new
    assert live.peak == 8000 and z[0] == 3
    layer, x = nn.Linear(100, 10), torch.zeros(1, 100)
    with g.LiveBytes() as live, torch.no_grad():
        layer(x)
    assert live.peak == 40                                   # the output, no weights


def test_sharpness_of_a_ramp_is_its_slope():
    slope = 3.0                                              # grey levels a pixel
    ramp = (slope * torch.arange(32) / 255).expand(1, 3, 32, 32) * 2 - 1
    close(g.sharpness(ramp), torch.tensor([slope]), 1e-3)
    close(g.sharpness(ramp.transpose(2, 3)), torch.tensor([slope]), 1e-3)
    assert g.sharpness(torch.zeros(1, 3, 32, 32)).item() == 0


def test_ordered_pairs_counts_what_an_estimator_gets_right():
    def knowing(lq):
        """Less gradient: more blur.  More curvature in the calm half: more noise."""
        curve = (lq[..., 2:] - 2 * lq[..., 1:-1] + lq[..., :-2]).abs().flatten(1)
        gradient = (lq[..., 1:] - lq[..., :-1]).abs().mean()
        return torch.stack([-gradient, curve.quantile(0.3)])[None]
    pairs = r.held_out(dataclasses.replace(MICRO, val_data=str(HERE / "tiny_data/val")))
    assert g.ordered_pairs(knowing, pairs) == {"blur": 1.0, "noise": 1.0}
    for wrong in (lambda lq: torch.zeros(1, 2), lambda lq: -knowing(lq)):
        assert g.ordered_pairs(wrong, pairs) == {"blur": 0, "noise": 0}


def test_growth_finds_the_exponents(monkeypatch, capsys):
    def fake(models, size, details):
        return {"A": {"ms": 2.0 * size[0] ** 2.4, "bytes": 1e6 * size[1] ** 2}}
    monkeypatch.setattr(g, "benchmark", fake)
    found = g.growth({"A": None}, range(256, 513, 128))
    assert found["A", "ms"] == pytest.approx(1.2, abs=1e-6)
    assert found["A", "bytes"] == pytest.approx(1.0, abs=1e-6)
    assert "256^2" in capsys.readouterr().out


def test_memory_estimate_of_a_training_step_equals_a_real_one(monkeypatch):
    no_backbone(monkeypatch)
    estimate, real = g.training(MICRO), g.training(MICRO, real=True)
    assert list(estimate) == list(real) == ["resshift", "gendr", "adc", "pix"]
    for stage in real:
        assert estimate[stage]["state"] == real[stage]["state"]
        # attention runs in one piece on the CPU and in several on the meta device
        ratio = estimate[stage]["activations"] / real[stage]["activations"]
        assert 0.95 < ratio < 1.25, (stage, ratio)
    n, vae, lpips = map(count, (r.ResShift(MICRO), r.VAE(MICRO), r.Perceptual("alex")))
    # weights, two moments and the average of the prior; weights alone of the others
    assert real["resshift"]["state"] == 4 * (4 * n + vae + lpips)


def test_ablation_trains_every_row_and_goes_on_where_it_stopped(tmp_path, in_project,
                                                                monkeypatch, capsys):
    no_backbone(monkeypatch)
    run, _, vae, prior = world(tmp_path, dataclasses.replace(
        MICRO, ablate_steps=1, prior_steps=1))
    estimator, hq = g.DegradationEstimator(MICRO).requires_grad_(False), photo(64)
    pair = r.Held("a", hq, r.degrade(hq, MICRO, rng())[0], None)
    models = g.Models(vae, prior, estimator, None, None, None)
    lpips = r.Perceptual("alex")
    table = g.ablate(run, models, [pair], lpips, seeds=2)
    assert list(table) == list(g.ABLATED) and all(len(v) == 2 for v in table.values())
    start, plain = (table[k] for k in list(table)[:2])
    assert start[0] == start[1] and plain[0] != start[0]     # no steps: no seed in it
    assert json.loads((run.folder / "table.json").read_text()) == table
    monkeypatch.setattr(g, "train", None)                    # nothing is left to train
    assert g.ablate(run, models, [pair], lpips, seeds=2) == table
    printed = capsys.readouterr().out
    assert all(printed.count(f"\n{name:26s} ") == 2 for name in g.ABLATED)


def test_the_figure_of_scores_draws_a_grid(tmp_path):
    model, _ = awake_restorer()
    hq = photo(64)
    pair = r.Held("a", hq, r.degrade(hq, MICRO, rng())[0], None)
    g.draw_scores(model, g.DegradationEstimator(MICRO), pair, MICRO, tmp_path / "s.png")
    array = np.array(Image.open(tmp_path / "s.png").convert("RGB"))
    assert array.shape[1] > 800 and array.std() > 20


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
    flags = ["--pool", 8, "--batch", 2, "--crop", 64, "--unet-widths", 16, 32,
             "--groups", 8, "--head-width", 16, "--vae-widths", 8, 8, 8, 16,
             "--vae-groups", 4, "--vae-crop", 32, "--steps", 4, "--size", 64,
             "--log-every", 2]
    for name in ("vae", "prior", "estimator", "gendr", "adc", "pix"):
        flags += [f"--{name}-steps", 2]
    done = command("gendr_pix.py", "--train", "--tiny", "--run", folder, *flags)
    return folder, done


def test_train_goes_through_every_stage_and_writes_every_file(finished):
    folder, done = finished
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout.splitlines()[-1].startswith(("PASS", "FAIL"))
    for name in ("vae", "resshift", "estimator", "gendr", "adc", "pix"):
        assert (folder / f"{name}.safetensors").stat().st_size > 0
        assert not (folder / f"{name}.ckpt").exists()
    stages = {line.split(",")[0] for line in
              (folder / "log.csv").read_text().splitlines()[1:]}
    assert stages == {"vae", "resshift", "estimator", "gendr", "adc", "pix"}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["lpips"] == "LPIPS (random features)"
    assert {"bicubic", "GenDR", "GenDR-Pix"} <= set(metrics["table"])
    assert done.stdout.count("PASS") + done.stdout.count("FAIL") == 1
    passed = all(c["floor"] for c in metrics["checks"])
    assert (done.returncode == 0) == passed
    assert Image.open(folder / "report.png").size[0] > 600


def test_loaded_weights_give_the_table_of_the_training_process(finished):
    folder, _ = finished
    before = json.loads((folder / "metrics.json").read_text())["table"]
    done = command("gendr_pix.py", "--eval", "--run", folder, "--size", 64)
    assert done.returncode in (0, 1), done.stderr
    after = json.loads((folder / "metrics.json").read_text())["table"]
    assert before.keys() == after.keys()
    for name in before:
        assert before[name]["psnr"] == pytest.approx(after[name]["psnr"], abs=1e-4)


def test_evaluation_on_real_pairs_measures_those_pairs(finished, tmp_path):
    folder, _ = finished
    (tmp_path / "lq").mkdir()
    (tmp_path / "hq").mkdir()
    hq = Image.open(HERE / "tiny_data/val/rocket.png").crop((0, 0, 120, 100))
    lq = hq.resize((30, 25), Image.BICUBIC)
    hq.save(tmp_path / "hq/a.png")
    lq.save(tmp_path / "lq/a.png")
    done = command("gendr_pix.py", "--eval", "--run", folder, "--data", tmp_path)
    assert done.returncode == 0, done.stderr
    row = next(x for x in done.stdout.splitlines() if x.startswith("bicubic")).split()
    up = lq.resize((120, 100), Image.BICUBIC)
    a, b = (r.to_unit(r.from_pil(p)) for p in (up, hq))
    assert float(row[1]) == pytest.approx(r.psnr(a, b).item(), abs=0.05)
    lq.resize((20, 20)).save(tmp_path / "lq/a.png")
    done = command("gendr_pix.py", "--eval", "--run", folder, "--data", tmp_path)
    assert done.returncode == 2 and "not 4 times as large" in done.stderr


def test_resshift_in_pixel_space_trains_and_restores(tmp_path):
    run = ("--tiny", "--run", tmp_path / "pixel")
    done = command("resshift.py", "--train", *run, "--space", "pixel", "--pool", 4,
                   "--batch", 2, "--crop", 64, "--unet-widths", 16, 32, "--groups", 8,
                   "--head-width", 16, "--vae-crop", 32, "--prior-steps", 2)
    assert done.returncode == 0, done.stderr
    names = {p.name for p in (tmp_path / "pixel").iterdir()}
    assert "resshift.safetensors" in names and "vae.safetensors" not in names
    r.save_picture(photo(30), tmp_path / "lq.png")
    done = command("resshift.py", *run, "--input", tmp_path / "lq.png", "--output",
                   tmp_path / "up.png")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "up.png").size == (120, 120)


def test_compare_trains_every_row_and_prints_one_table(tmp_path):
    done = command("resshift.py", "--compare", "--tiny", "--run", tmp_path / "c",
                   "--pool", 4, "--batch", 2, "--crop", 64, "--unet-widths", 16, 32,
                   "--groups", 8, "--head-width", 16, "--vae-widths", 8, 8, 8, 16,
                   "--vae-groups", 4, "--vae-crop", 32, "--vae-steps", 1,
                   "--prior-steps", 1)
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("held-out photos"):].splitlines()
    assert len(table) == 2 + len(r.COMPARED)
    assert all(line.startswith(name) for line, name in zip(table[1:], r.COMPARED))


def test_a_picture_goes_in_and_comes_out_four_times_larger(finished, tmp_path):
    folder, _ = finished
    lq = Image.open(HERE / "tiny_data/val/dahlia.png").resize((45, 37))
    lq.putalpha(128)
    lq.save(tmp_path / "lq.png")
    done = command("gendr_pix.py", "--run", folder, "--input", tmp_path / "lq.png",
                   "--output", tmp_path / "up.png", "--passes", 2)
    assert done.returncode == 0, done.stderr
    up = Image.open(tmp_path / "up.png")
    assert up.size == (180, 148) and up.mode == "RGBA" and up.getpixel((5, 5))[3] == 128
    small = up.convert("RGB").resize((45, 37), Image.BOX)
    error = np.abs(np.array(small, float) - np.array(lq.convert("RGB"), float)).mean()
    assert error < 12                            # right side up, and its own colours


def test_bad_input_gets_one_line_and_exit_code_2(finished, tmp_path):
    folder, _ = finished
    (tmp_path / "bad.png").write_bytes(b"\x89PNG but not really")
    cases = [("--run", folder, "--input", tmp_path / "bad.png"),
             ("--run", tmp_path / "none", "--input", tmp_path / "bad.png"),
             ("--train", "--tiny", "--run", tmp_path / "r",
              "--train-data", tmp_path / "x"),
             ("--input", "a.png", "--degradation", "2,1"), ("--no-such-flag",)]
    for arguments in cases:
        done = command("gendr_pix.py", *arguments)
        assert done.returncode == 2, done.stderr
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")


def test_importing_does_nothing_visible(tmp_path):
    done = command("-c", f"import sys; sys.path.insert(0, {str(HERE)!r}); "
                   "import gendr_pix", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "" and not list(tmp_path.iterdir())


if __name__ == "__main__":
    train_every_stage(sys.argv[1], int(sys.argv[2]))
