"""Schedule, objective and solvers equal those of Mediffusion, the package that the paper trained with; and where it
errs, ours does not."""
import math

import pytest
import torch

from radrotator.batch import Batch
from radrotator.model.diffusion import ALPHA_BAR, LAST, STEPS, add_noise, clean_from, log_variance, reverse_step
from radrotator.model.diffusion import variance_loss, velocity, velocity_loss
from radrotator.model.sample import ddim, ddim_inversion, ddpm, denoiser, guide, time_steps
from radrotator.model.unet import UNet, UNetConfig
from radrotator.train.config import TrainConfig
from radrotator.train.objective import compute_loss, join_batches, make_noisy_batches

EVERY = torch.arange(STEPS)


@pytest.fixture(scope="module")
def process(mediffusion):
    "Their diffusion with the paper's configuration, built as `DiffusionModule` builds it"
    base, schedule = mediffusion.base, mediffusion.schedule
    cosine = schedule.get_named_beta_schedule("cosine", STEPS, cosine_s=0.008)
    betas, _ = schedule.get_respaced_betas(cosine, [STEPS])
    kinds = base.ModelMeanType.VELOCITY, base.ModelVarType.LEARNED_RANGE, base.LossType.MSE
    return base.GaussianDiffusionBase(schedule.enforce_zero_terminal_snr(betas), *kinds)


def images(n=STEPS, dtype=torch.float64, seed=0):
    "Clean images in [-1, 1], noise, a velocity and a second output"
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(n, 1, 4, 4, generator=generator, dtype=torch.float64)*2 - 1
    return [x.to(dtype) for x in (x0, *torch.randn(3, n, 1, 4, 4, generator=generator, dtype=torch.float64))]


def equal(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=0, atol=tolerance)


def test_tables_are_mediffusions(process):
    beta, posterior, on_clean, on_noisy = reverse_step(EVERY, EVERY - 1)
    equal(ALPHA_BAR, process.alphas_cumprod, 1e-12)
    equal(beta, process.betas, 1e-12)
    equal(posterior, process.posterior_variance, 1e-12)
    # Divided by 1 − ᾱ, which begins at 4e-5, the last digit of a double counts 1e-11.
    equal(on_clean, process.posterior_mean_coef1, 1e-11)
    equal(on_noisy, process.posterior_mean_coef2, 1e-11)
    equal(log_variance(-1.0, beta, posterior), process.posterior_log_variance_clipped, 1e-11)
    equal(log_variance(1.0, beta, posterior), process.betas.log(), 1e-11)


def test_noising_and_target_are_mediffusions(process):
    x0, noise, v, o = images()
    x_t = add_noise(x0, EVERY, noise)
    equal(x_t, process.q_sample(x0, EVERY, noise), 1e-12)
    equal(velocity(x0, EVERY, noise), process._get_v_target(x0, noise, EVERY), 1e-12)
    equal(clean_from(x_t, EVERY, v), process._predict_xstart_from_v(x_t, EVERY, v), 1e-12)
    told = process.p_mean_variance(lambda *_: torch.cat([v, o], dim=1), x_t, EVERY, clip_denoised=False)
    beta, posterior, on_clean, on_noisy = (value.view(-1, 1, 1, 1) for value in reverse_step(EVERY, EVERY - 1))
    equal(on_clean*clean_from(x_t, EVERY, v) + on_noisy*x_t, told["mean"], 1e-10)
    equal(log_variance(o, beta, posterior), told["log_variance"], 1e-10)


def test_loss_is_mediffusions_and_its_variance_output_learns(mediffusion, process):
    x0, noise, v, o = images()
    x_t = add_noise(x0, EVERY, noise)
    output = torch.cat([v, o], dim=1).requires_grad_()
    terms = process.training_losses(lambda *_: output, x0, EVERY, noise=noise)
    equal(velocity_loss(v, velocity(x0, EVERY, noise), EVERY), terms["mse"].mean(), 1e-10)
    terms["loss"].mean().backward()
    of_velocity, of_variance = output.grad.split(1, dim=1)
    assert (of_velocity != 0).all() and (of_variance == 0).all()  # the original's second output stays as it was
    o.requires_grad_()
    variance_loss(o, v, x0, x_t, EVERY).backward()
    assert (o.grad.abs().amax((1, 2, 3)) > 0).all()
    true_mean, _, true_log = process.q_posterior_mean_variance(x0, x_t, EVERY)
    told = process.p_mean_variance(lambda *_: output.detach(), x_t, EVERY, clip_denoised=False)
    divergence = mediffusion.losses.normal_kl(true_mean, true_log, told["mean"], told["log_variance"])
    bits = divergence.mean((1, 2, 3)).float()/math.log(2)
    for t in (1, 2, 10, 500, LAST):  # at 0 theirs is an 8-bit decoder's likelihood
        one = slice(t, t + 1)
        found = variance_loss(o[one], v[one], x0[one], x_t[one], EVERY[one])
        torch.testing.assert_close(found, bits[t], rtol=1e-5, atol=1e-6)


def test_variance_head_of_a_network_learns():
    torch.manual_seed(0)
    small = dict(size=16, channels=8, multipliers=(1, 2), attention=(2,), heads=2, groups=4, conditions=3)
    config = TrainConfig(UNetConfig(**small))
    network = UNet(config.unet)
    last = network.out[-1].weight
    batch = Batch(*torch.rand(2, 8, 1, 16, 16), torch.zeros(8, 3))
    asked = join_batches(make_noisy_batches(batch, config, "cpu", "test"))
    compute_loss(network, asked, config).backward()
    assert last.shape[0] == 2 and (last.grad.flatten(1).norm(dim=1) > 0).all()


class Anything(torch.nn.Module):
    "What their solvers ask of a network, with any function in it"
    def __init__(self, dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, dtype=dtype))

    def forward_with_cond_scale(self, x, t, cond_scale): return torch.cat(anything(x, t), dim=1)


def anything(x, t): return torch.tanh(x.roll(1, -1)*0.7 - 0.1) - 0.3*x, 0.5*x.sin()


def seeded(seed): return torch.Generator().manual_seed(seed)


def drawn(seed):
    generator = seeded(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


@pytest.mark.parametrize("n", [200, 50, 20, 10])
def test_ddim_is_mediffusions(mediffusion, process, n):
    solver, steps = mediffusion.solvers.DDIMSolver, time_steps(n, "leading")
    noise = torch.randn(2, 1, 16, 16, generator=seeded(0))
    expected = solver(process, n).sample(Anything(torch.float32), noise)
    equal(ddim(denoiser(anything), noise, steps), expected, 1e-5)
    expected = solver(process, n, eta=0.7).sample(Anything(torch.float64), noise.double(), generator=seeded(1))
    equal(ddim(denoiser(anything), noise.double(), steps, eta=0.7, draw=drawn(1)), expected, 1e-9)


def test_ddpm_is_mediffusions(mediffusion, process):
    noise = torch.randn(2, 1, 8, 8, generator=seeded(0), dtype=torch.float64)
    expected = mediffusion.solvers.DDPMSolver(process).sample(Anything(torch.float64), noise, generator=seeded(1))
    equal(ddpm(denoiser(anything), noise, time_steps(STEPS), draw=drawn(1)), expected, 1e-8)


def test_inversion_is_mediffusions(mediffusion, process):
    # Theirs goes on from the last step of its grid to pure noise: our step 999.
    image = torch.rand(2, 1, 8, 8, generator=seeded(0), dtype=torch.float64)*2 - 1
    expected = mediffusion.solvers.InverseDDIMSolver(process, 50).sample(Anything(torch.float64), image)
    equal(ddim_inversion(denoiser(anything), image, [LAST, *time_steps(50, "leading")]), expected, 1e-9)


def test_at_the_step_without_signal_theirs_is_not_finite_and_ours_is(mediffusion, process):
    noise = torch.randn(1, 1, 8, 8, generator=seeded(0))
    n = 334  # every third step: 0, 3, … 999
    assert torch.isnan(mediffusion.solvers.DDIMSolver(process, n).sample(Anything(torch.float32), noise)).all()
    assert torch.isfinite(ddim(denoiser(anything), noise, list(range(LAST, -1, -3)))).all()


def their_network(mediffusion, generator):
    "Small, of random numbers"
    shape = dict(input_size=16, in_channels=2, out_channels=2, model_channels=32, num_res_blocks=[1, 1])
    inside = dict(attention_resolutions=[2], channel_mult=[1, 2], num_heads=2)
    told = dict(num_classes=4, concat_channels=1, guidance_drop_prob=0.1)
    network = mediffusion.unet.UNetModel(**shape, **inside, **told).eval()
    for p in network.parameters(): p.data = 0.1*torch.randn(p.shape, generator=generator)
    return network


@torch.no_grad()
def test_guidance_is_mediffusions_for_one_image_and_ours_for_many(mediffusion):
    generator = seeded(0)
    network = their_network(mediffusion, generator)
    x, radiograph = torch.randn(2, 3, 1, 16, 16, generator=generator)*torch.tensor([0.1, 1, 3]).view(3, 1, 1, 1)
    vector, t = torch.randn(3, 4, generator=generator), torch.tensor([500, 500, 500])
    def ask(i): return network.forward_with_cond_scale(x[i], t[i], cls=vector[i], concat=radiograph[i], cond_scale=4)
    told = network(x, t, cls=vector, concat=radiograph, drop_cls_prob=0)
    untold = network(x, t, cls=vector, concat=radiograph, drop_cls_prob=1)
    ours = guide(told, untold, 4.0, "pypi", rescale=0.7)
    alone = torch.cat([ask(slice(i, i + 1)) for i in range(3)])
    assert (ours - alone).abs().max() < 1e-5*alone.abs().max()
    # in a batch theirs depends on the neighbours
    assert (ask(slice(0, 3)) - alone).abs().max() > 1e-2*alone.abs().max()
