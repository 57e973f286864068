"""The network is Mediffusion's: with the same weights it gives the same output, and weights go there and back through a checkpoint."""
import importlib.util, io, os, pickle, sys, types
from dataclasses import replace

import pytest
import torch
from torch import nn

from radrotator.core import RadRotatorError, error_code
from radrotator.model.diffusion import STEPS, add_noise, velocity, velocity_loss
from radrotator.model.sample import ddim, guided_denoiser, time_steps
from radrotator.model.unet import UNet, UNetConfig, count_parameters
from radrotator.model.weights import load_weights, save_weights
from radrotator.model.mediffusion import load_mediffusion, to_mediffusion

SMALL = UNetConfig(size=32, channels=32, multipliers=(1, 2, 2), blocks=1, attention=(2, 4), heads=2, condition_scale=1.0)
TIMES = torch.tensor([0, 1, 500, 998, 999])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Small tensors are not worth a second thread, least of all where other tests run beside"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def theirs():
    "A function that builds Mediffusion's network for a configuration of ours"
    found = importlib.util.find_spec("mediffusion")
    if found is None: pytest.skip("mediffusion is not installed (pip install --no-deps mediffusion)")
    package = types.ModuleType("mediffusion")  # its own __init__ imports Lightning, wandb and more, which the network does not need
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["mediffusion"] = package
    from mediffusion.models.unet import UNetModel
    return lambda c: UNetModel(c.size, 2, c.channels, 1 + c.learned_variance, [c.blocks]*len(c.multipliers), c.attention, channel_mult=c.multipliers, num_heads=c.heads,
                               num_classes=c.conditions, concat_channels=1, guidance_drop_prob=0.1, use_scale_shift_norm=True).eval()


def drawn(config, seed=0):
    "A network of ours in which no layer is zero"
    torch.manual_seed(seed)
    network = UNet(config).eval()
    for module in network.modules():
        if getattr(module, "weight", None) is not None and not module.weight.any(): module.reset_parameters()
    assert all(p.any() for name, p in network.named_parameters() if name.endswith("weight"))
    return network


def inputs(config, times):
    "Noisy images, steps, radiographs, rotations in whole degrees"
    n, size = len(times), config.size
    return torch.randn(n, 1, size, size), times, torch.rand(n, 1, size, size)*2 - 1, torch.randint(-15, 16, (n, 3)).float()


@torch.no_grad()
def difference(ours, other, x_t, t, input, vector, drop=None):
    "Largest difference between both networks' outputs, relative to the largest output"
    cls = nn.functional.pad(vector/ours.config.condition_scale, (0, ours.config.conditions - 3))
    embedded = other.class_embed(cls)
    if drop is not None: embedded = torch.where(drop[:, None], other.null_cls_embed, embedded)
    expected = other(x_t, t, cls_embed=embedded, concat=input, drop_cls_prob=0)
    return ((torch.cat([o for o in ours(x_t, t, input, vector, drop) if o is not None], 1) - expected).abs().max()/expected.abs().max()).item()


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, multipliers=(1, 3), blocks=2, attention=(), heads=4, conditions=3, learned_variance=False), replace(SMALL, condition_scale=15.0)],
                         ids=["small", "without variance", "angles divided"])
@torch.no_grad()
def test_outputs_are_theirs(theirs, config):
    ours, other = drawn(config), theirs(config)
    other.load_state_dict({name.removeprefix("model."): tensor for name, tensor in to_mediffusion(ours).items()})
    given = inputs(config, TIMES)
    assert difference(ours, other, *given) < 1e-5
    assert difference(ours, other, *given, torch.tensor([True, False, True, False, True])) < 1e-5
    everyone = torch.ones(len(TIMES), dtype=torch.bool)
    null = other(given[0], given[1], cls=given[3].new_zeros(len(TIMES), config.conditions), concat=given[2], drop_cls_prob=1)  # their own dropout
    assert torch.allclose(torch.cat([o for o in ours(*given, everyone) if o is not None], 1), null, atol=1e-5*null.abs().max())


def test_a_wrong_weight_shows(theirs):
    ours, other = drawn(SMALL), theirs(SMALL)
    other.load_state_dict(ours.state_dict())
    with torch.no_grad(): other.middle_block[1].qkv.weight[0] *= 1.1
    assert difference(ours, other, *inputs(SMALL, TIMES)) > 1e-5


@torch.no_grad()
def test_outputs_of_the_papers_network_are_theirs(theirs):  # slow-ish: some 3 s a pair of forwards
    config = replace(UNetConfig.paper(), condition_scale=1.0)
    ours, other = drawn(config), theirs(config)
    assert count_parameters(ours) == sum(p.numel() for p in other.parameters()) == 125_635_074
    other.load_state_dict({name.removeprefix("model."): tensor for name, tensor in to_mediffusion(ours).items()})
    assert difference(ours, other, *inputs(config, torch.tensor([999]))) < 1e-5


def lightning(network, settings, **more):
    "A checkpoint as Lightning and Mediffusion's EMA write it"
    weights = to_mediffusion(network)
    return {"epoch": 3, "global_step": 17, "pytorch-lightning_version": "2.1.0", "state_dict": {n: t + 1 for n, t in weights.items()}, "ema_state_dict": weights, "_ema_state_dict_ready": True,
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}], "lr_schedulers": [], "loops": {"fit_loop": {"state_dict": {}}},
            "callbacks": {"ModelCheckpoint{'monitor': 'val_loss'}": {"best_model_score": torch.tensor(0.1), "best_model_path": "x.ckpt"}}, "hyper_parameters": settings, **more}


def their_settings(config):
    return dict(model=dict(input_size=config.size, num_heads=config.heads, dims=2, channel_mult=list(config.multipliers), num_head_channels=-1, missing_class_value=None),
                diffusion=dict(timesteps=1000, schedule_name="cosine", enforce_zero_terminal_snr=True, mean_type="VELOCITY"))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["plain", "omegaconf"])
def test_checkpoint_there_and_back(tmp_path, monkeypatch, kind, compiled):
    network, settings = drawn(SMALL), their_settings(SMALL)
    if kind == "omegaconf": settings = pytest.importorskip("omegaconf").OmegaConf.create(settings)
    content = lightning(network, settings, hparams_type=type(settings) if kind == "omegaconf" else None)
    if compiled:
        for part in ("state_dict", "ema_state_dict"): content[part] = {n.replace("model.", "model._orig_mod."): t for n, t in content[part].items()}
    torch.save(content, tmp_path/"run.ckpt")
    for name in [n for n in sys.modules if n.split(".")[0] == "omegaconf"]: monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    back = load_mediffusion(tmp_path/"run.ckpt")
    assert back.config == SMALL and not back.training
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), back.state_dict().values(), strict=True))
    raw = load_mediffusion(tmp_path/"run.ckpt", ema=False)
    assert all(torch.equal(a + 1, b) for a, b in zip(network.state_dict().values(), raw.state_dict().values(), strict=True))
    save_weights(back, tmp_path/"w.safetensors", {})
    assert load_weights(tmp_path/"w.safetensors")[0].config == SMALL


def test_size_and_heads_can_be_given(tmp_path):
    torch.save(lightning(drawn(SMALL), {}), tmp_path/"run.ckpt")
    assert (lambda c: (c.size, c.heads))(load_mediffusion(tmp_path/"run.ckpt").config) == (256, 4)
    assert load_mediffusion(tmp_path/"run.ckpt", size=32, heads=2, condition_scale=15.0).config == replace(SMALL, condition_scale=15.0)


def spoilt(content, change):
    content["ema_state_dict"] = dict(content["ema_state_dict"])
    change(content)
    return content


REFUSALS = {
    "no averaged weights": lambda c: c.pop("ema_state_dict"),
    "holds no weights": lambda c: c.update(ema_state_dict={}, state_dict={}),
    "without conditions": lambda c: [c["ema_state_dict"].pop(n) for n in list(c["ema_state_dict"]) if "cls" in n or "class" in n],
    "the tensor input_blocks.0.0.weight is 32×3×3×3 there and 32×2×3×3 here": lambda c: c["ema_state_dict"].update({"model.input_blocks.0.0.weight": torch.zeros(32, 3, 3, 3)}),
    "the tensor out.0.bias is missing there": lambda c: c["ema_state_dict"].pop("model.out.0.bias"),
    "the tensor extra is 2 there and missing here": lambda c: c["ema_state_dict"].update(extra=torch.zeros(2)),
    "it has no tensor time_embed.0.weight": lambda c: c["ema_state_dict"].pop("model.time_embed.0.weight"),
    "model.scale_skip_connection = True": lambda c: c["hyper_parameters"]["model"].update(scale_skip_connection=True),
    "diffusion.enforce_zero_terminal_snr = False": lambda c: c["hyper_parameters"]["diffusion"].update(enforce_zero_terminal_snr=False),
    "objects of builtins.eval": lambda c: c.update(evil=Evil()),
}


class Evil:
    "What a pickle can do when it is loaded"
    def __reduce__(self): return eval, ("__import__('os').environ.__setitem__('RADROTATOR_EVIL', '1')",)


@pytest.mark.parametrize("message", REFUSALS)
def test_what_does_not_fit_is_refused(tmp_path, message):
    torch.save(spoilt(lightning(drawn(SMALL), their_settings(SMALL)), REFUSALS[message]), tmp_path/"run.ckpt")
    with pytest.raises(RadRotatorError, match=message): load_mediffusion(tmp_path/"run.ckpt")
    assert "RADROTATOR_EVIL" not in os.environ


def test_broken_files_are_refused(tmp_path):
    file = io.BytesIO()
    torch.save(lightning(drawn(SMALL), their_settings(SMALL)), file)
    whole, path = file.getvalue(), tmp_path/"run.ckpt"
    assert error_code(lambda: load_mediffusion(path)) == "NO_CHECKPOINT"
    pieces = [whole[:int(len(whole)*share)] for share in (0, 0.01, 0.3, 0.9, 0.999)]
    for content in (*pieces, b"text", pickle.dumps({"state_dict": {}}), pickle.dumps(Evil())):
        path.write_bytes(content)
        assert error_code(lambda: load_mediffusion(path)) == "NOT_A_CHECKPOINT"
    torch.save(torch.zeros(3), path)
    assert error_code(lambda: load_mediffusion(path)) == "NOT_A_CHECKPOINT"
    assert "RADROTATOR_EVIL" not in os.environ


TOY = UNetConfig(size=8, channels=8, multipliers=(1, 2), blocks=1, attention=(2,), heads=2, groups=4, conditions=3)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_it_is_finite_at_every_step(precision):
    network = drawn(TOY).cast(precision)
    v, o = network(*inputs(TOY, torch.arange(STEPS)))
    assert v.dtype == o.dtype == torch.float32 and v.isfinite().all() and o.isfinite().all()
    for spacing in ("trailing", "leading"):
        x_t, _, input, vector = inputs(TOY, torch.arange(2))
        assert ddim(guided_denoiser(network, input, vector, 4.0), x_t, time_steps(7, spacing)).isfinite().all()


def test_it_learns_a_shift():
    torch.manual_seed(0)
    network = UNet(TOY)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    losses = []
    for _ in range(50):
        noise, t, input, _ = inputs(TOY, torch.randint(0, STEPS, (16,)))
        input = nn.functional.avg_pool2d(input, 3, 1, 1)*2
        target = input.roll(1, dims=-1)
        x_t = add_noise(target, t, noise)
        v, _ = network(x_t, t, input, torch.zeros(16, 3))
        loss = velocity_loss(v, velocity(target, t, noise), t, "image")
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6*sum(losses[:10])


def gradients(network, given, drop, precision=torch.float32):
    "Gradient of every parameter, and bytes of the activations that the forward pass kept for them"
    kept, own = {}, {p.untyped_storage().data_ptr() for p in network.parameters()}
    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor, tensor.untyped_storage().nbytes()
        return tensor
    network.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", precision, enabled=precision != torch.float32): v, o = network(*given, drop)
    (v.square().mean() + (0 if o is None else o.square().mean())).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters()}, sum(size for place, (_, size) in kept.items() if place not in own)


@pytest.mark.parametrize("config, precision, factor", [(replace(UNetConfig.paper(), size=64, channels=32), torch.float32, 7), (UNetConfig.tiny(), torch.float32, 5), (UNetConfig.tiny(), torch.bfloat16, 5)],
                         ids=["a quarter of the paper", "tiny", "tiny in bfloat16"])
def test_checkpointing_keeps_less_and_changes_no_bit(config, precision, factor):
    network, given = drawn(config).train(), inputs(config, torch.tensor([0, 999]))
    drop = torch.tensor([True, False])
    plain, much = gradients(network, given, drop, precision)
    network.checkpointing = True
    again, little = gradients(network, given, drop, precision)
    assert much > factor*little
    assert all(plain[name].any() and torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_as_one_graph_it_says_the_same(checkpointing):  # by PyTorch's tracer alone: compiling for the CPU takes a minute
    network, given = drawn(TOY).train(), inputs(TOY, torch.tensor([0, 500, 999]))
    drop, network.checkpointing = torch.tensor([True, False, False]), checkpointing
    answers = []
    for function in (network, torch.compile(network, backend="aot_eager", fullgraph=True)):
        network.zero_grad()
        outputs = function(*given, drop)
        sum(output.square().mean() for output in outputs).backward()
        answers.append([*outputs, *(p.grad for p in network.parameters())])
    torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True)) and all(a.any() for a in answers[0])
