"""The network is Mediffusion's: with the same weights it gives the same output, and weights go there and back through
a checkpoint."""
import io, os, pickle, sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from radrotator.core import RadRotatorError, error_code
from radrotator.model.diffusion import STEPS, add_noise, velocity, velocity_loss
from radrotator.model.mediffusion import load_mediffusion, to_mediffusion
from radrotator.model.sample import ddim, guided_denoiser, time_steps
from radrotator.model.unet import UNet, UNetConfig, count_parameters
from radrotator.model.weights import load_weights, save_weights

SMALL = UNetConfig(
    size=32,
    channels=32,
    multipliers=(1, 2, 2),
    blocks=1,
    attention=(2, 4),
    heads=2,
    condition_scale=1.0,
)
TIMES = torch.tensor([0, 1, 500, 998, 999])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Small tensors are not worth a second thread, least of all where other tests run beside"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def theirs(mediffusion):
    "A function that builds Mediffusion's network for a configuration of ours"
    def build(c):
        shape = c.size, 2, c.channels, 1 + c.learned_variance, [c.blocks]*len(c.multipliers), c.attention
        inside = dict(channel_mult=c.multipliers, num_heads=c.heads, use_scale_shift_norm=True)
        told = dict(num_classes=c.conditions, concat_channels=1, guidance_drop_prob=0.1)
        return mediffusion.unet.UNetModel(*shape, **inside, **told).eval()
    return build


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
    noisy, radiograph = torch.randn(n, 1, size, size), torch.rand(n, 1, size, size)*2 - 1
    return noisy, times, radiograph, torch.randint(-15, 16, (n, 3)).float()


def joined(outputs):
    "Velocity, and the second output where there is one"
    return torch.cat([output for output in outputs if output is not None], 1)


def give_weights(ours, other):
    "Load the weights of our network into theirs"
    other.load_state_dict({name.removeprefix("model."): tensor for name, tensor in to_mediffusion(ours).items()})


@torch.no_grad()
def difference(ours, other, x_t, t, input, vector, drop=None):
    "Largest difference between both networks' outputs, relative to the largest output"
    cls = nn.functional.pad(vector/ours.config.condition_scale, (0, ours.config.conditions - 3))
    embedded = other.class_embed(cls)
    if drop is not None: embedded = torch.where(drop[:, None], other.null_cls_embed, embedded)
    expected = other(x_t, t, cls_embed=embedded, concat=input, drop_cls_prob=0)
    found = joined(ours(x_t, t, input, vector, drop))
    return ((found - expected).abs().max()/expected.abs().max()).item()


ODD = dict(multipliers=(1, 3), blocks=2, attention=(), heads=4, conditions=3, learned_variance=False)
CONFIGS = {
    "small": SMALL,
    "without variance": replace(SMALL, **ODD),
    "angles divided": replace(SMALL, condition_scale=15.0),
}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_outputs_are_theirs(theirs, name):
    config = CONFIGS[name]
    ours, other = drawn(config), theirs(config)
    give_weights(ours, other)
    given = inputs(config, TIMES)
    assert difference(ours, other, *given) < 1e-5
    assert difference(ours, other, *given, torch.tensor([True, False, True, False, True])) < 1e-5
    noisy, times, radiograph, vector = given
    nothing = vector.new_zeros(len(TIMES), config.conditions)
    null = other(noisy, times, cls=nothing, concat=radiograph, drop_cls_prob=1)  # their own dropout
    everyone = torch.ones(len(TIMES), dtype=torch.bool)
    assert torch.allclose(joined(ours(*given, everyone)), null, atol=1e-5*null.abs().max())


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
    give_weights(ours, other)
    assert difference(ours, other, *inputs(config, torch.tensor([999]))) < 1e-5


def lightning(network, settings, **more):
    "A checkpoint as Lightning and Mediffusion's EMA write it"
    weights = to_mediffusion(network)
    group = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    best = {"best_model_score": torch.tensor(0.1), "best_model_path": "x.ckpt"}
    return {
        "epoch": 3,
        "global_step": 17,
        "pytorch-lightning_version": "2.1.0",
        "state_dict": {name: tensor + 1 for name, tensor in weights.items()},
        "ema_state_dict": weights,
        "_ema_state_dict_ready": True,
        "optimizer_states": [group],
        "lr_schedulers": [],
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val_loss'}": best},
        "hyper_parameters": settings,
    } | more


def their_settings(config):
    shape = dict(input_size=config.size, num_heads=config.heads, dims=2, channel_mult=list(config.multipliers))
    diffusion = dict(timesteps=1000, schedule_name="cosine", enforce_zero_terminal_snr=True, mean_type="VELOCITY")
    return dict(model=shape | dict(num_head_channels=-1, missing_class_value=None), diffusion=diffusion)


def same_tensors(one, other, added=0):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a + added, b) for a, b in pairs)


def compiled_names(weights):
    "As torch.compile names them"
    return {name.replace("model.", "model._orig_mod."): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["plain", "omegaconf"])
def test_checkpoint_there_and_back(tmp_path, monkeypatch, kind, compiled):
    network, settings = drawn(SMALL), their_settings(SMALL)
    if kind == "omegaconf": settings = pytest.importorskip("omegaconf").OmegaConf.create(settings)
    content = lightning(network, settings, hparams_type=type(settings) if kind == "omegaconf" else None)
    if compiled:
        for part in ("state_dict", "ema_state_dict"): content[part] = compiled_names(content[part])
    torch.save(content, tmp_path/"run.ckpt")
    for name in [name for name in sys.modules if name.split(".")[0] == "omegaconf"]:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    back = load_mediffusion(tmp_path/"run.ckpt")
    assert back.config == SMALL and not back.training and same_tensors(network, back)
    assert same_tensors(network, load_mediffusion(tmp_path/"run.ckpt", ema=False), added=1)
    save_weights(back, tmp_path/"w.safetensors", {})
    assert load_weights(tmp_path/"w.safetensors")[0].config == SMALL


def test_size_and_heads_can_be_given(tmp_path):
    path = tmp_path/"run.ckpt"
    torch.save(lightning(drawn(SMALL), {}), path)
    silent = load_mediffusion(path).config
    assert (silent.size, silent.heads) == (256, 4)
    told = load_mediffusion(path, size=32, heads=2, condition_scale=15.0).config
    assert told == replace(SMALL, condition_scale=15.0)


def change_average(checkpoint, change):
    "Change the averaged weights, not the others, with which they share tensors"
    checkpoint["ema_state_dict"] = dict(checkpoint["ema_state_dict"])
    change(checkpoint["ema_state_dict"])


WIDE = {"model.input_blocks.0.0.weight": torch.zeros(32, 3, 3, 3)}
SPOILT_WEIGHTS = {  # what is done to the averaged weights; the code, and what the sentence must name
    "another shape": (lambda w: w.update(WIDE), "OTHER_NETWORK", "input_blocks.0.0.weight 32×3×3×3 32×2×3×3"),
    "one too few": (lambda w: w.pop("model.out.0.bias"), "OTHER_NETWORK", "out.0.bias"),
    "one too many": (lambda w: w.update(extra=torch.zeros(2)), "OTHER_NETWORK", "extra"),
    "no steps": (lambda w: w.pop("model.time_embed.0.weight"), "OTHER_NETWORK", "time_embed.0.weight"),
}
SPOILT_CHECKPOINTS = {  # the same of the checkpoint
    "no average": (lambda c: c.pop("ema_state_dict"), "NO_AVERAGE", ""),
    "no weights": (lambda c: c.update(ema_state_dict={}, state_dict={}), "NO_WEIGHTS", ""),
    "scaled skips": (lambda c: c["hyper_parameters"]["model"].update(scale_skip_connection=True), "OTHER_SETTINGS",
                     "model.scale_skip_connection True"),
    "signal left": (lambda c: c["hyper_parameters"]["diffusion"].update(enforce_zero_terminal_snr=False),
                    "OTHER_SETTINGS", "diffusion.enforce_zero_terminal_snr False"),
    "evil": (lambda c: c.update(evil=Evil()), "FOREIGN_OBJECTS", "builtins.eval"),
}


class Evil:
    "What a pickle can do when it is loaded"
    def __reduce__(self): return eval, ("__import__('os').environ.__setitem__('RADROTATOR_EVIL', '1')",)


@pytest.mark.parametrize("name", [*SPOILT_WEIGHTS, *SPOILT_CHECKPOINTS])
def test_what_does_not_fit_is_refused(tmp_path, name):
    checkpoint = lightning(drawn(SMALL), their_settings(SMALL))
    change, code, named = (SPOILT_WEIGHTS | SPOILT_CHECKPOINTS)[name]
    if name in SPOILT_WEIGHTS: change_average(checkpoint, change)
    else: change(checkpoint)
    torch.save(checkpoint, tmp_path/"run.ckpt")
    with pytest.raises(RadRotatorError) as error: load_mediffusion(tmp_path/"run.ckpt")
    assert error.value.code == code and all(word in str(error.value) for word in named.split())
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
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6*sum(losses[:10])


def gradients(network, given, drop, precision=torch.float32):
    "Gradient of every parameter, and bytes of the activations that the forward pass kept for them"
    kept, own = {}, {p.untyped_storage().data_ptr() for p in network.parameters()}
    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor, tensor.untyped_storage().nbytes()
        return tensor
    network.zero_grad()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", precision, enabled=precision != torch.float32): v, o = network(*given, drop)
    (v.square().mean() + (0 if o is None else o.square().mean())).backward()
    size = sum(size for place, (_, size) in kept.items() if place not in own)
    return {name: p.grad.clone() for name, p in network.named_parameters()}, size


QUARTER = replace(UNetConfig.paper(), size=64, channels=32)
LESS = {  # how many times less is kept
    "a quarter of the paper": (QUARTER, torch.float32, 7),
    "tiny": (UNetConfig.tiny(), torch.float32, 5),
    "tiny in bfloat16": (UNetConfig.tiny(), torch.bfloat16, 5),
}


@pytest.mark.parametrize("config, precision, factor", LESS.values(), ids=LESS)
def test_checkpointing_keeps_less_and_changes_no_bit(config, precision, factor):
    network, given = drawn(config).train(), inputs(config, torch.tensor([0, 999]))
    drop = torch.tensor([True, False])
    plain, much = gradients(network, given, drop, precision)
    network.checkpointing = True
    again, little = gradients(network, given, drop, precision)
    assert much > factor*little
    assert all(plain[name].any() and torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_as_one_graph_it_says_the_same(checkpointing):
    "By PyTorch's tracer alone: compiling for the CPU takes a minute"
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
