"""What names a class, a module or their arguments: optimizers, schedules, networks, noise levels; and names of outputs."""

from collections.abc import Iterator

from tests.malformed.base import TRAIN, Malformed

_ARGUMENTS = ("betas=()", "betas=(0.9,)", "betas=5", "betas=(2,2)", "eps=nan", "eps=-1", "weight_decay=nan", "weight_decay='a'", "lr=1",
              "lr=nan",
              "no_such=1", "params=[]", "foreach=5", "=1", "a", "a==", "weight_decay=1e308", "capturable=True", "amsgrad=[]", "fused=True",
              "eps=__import__('os')", "weight_decay=" + "(" * 500, "betas=[0.9, 0.999]", "\udcff=1", "weight_decay=None")  # fmt: skip
_OPTIMIZERS = (".", "..", "", " ", "a.", ".a", "torch", "torch.optim", "torch.optim.LBFGS", "torch.optim.SparseAdam",
               "torch.optim.Optimizer", "os.system",
               "torch.optim.Rprop", "torch.optim.ASGD", "torch.optim.Adagrad", "torch.optim.Muon", "torch.nn.Linear", "no.such.Class",
               "builtins.dict",
               "torch.optim.lr_scheduler.StepLR", "adam", "\udcff.a", "a\n.b", "torch.optim.AdamW ", "this.that", "antigravity.x",
               "musubi_tuner.no.X",
               "n" * 5000 + ".a", "tests.malformed.base.Malformed")  # fmt: skip
_SCHEDULERS = (".", "", "StepLR", "torch.optim.lr_scheduler.ReduceLROnPlateau", "torch.optim.lr_scheduler.StepLR",
               "torch.optim.lr_scheduler.LRScheduler",
               "torch.optim.lr_scheduler.OneCycleLR", "torch.optim.lr_scheduler.CyclicLR", "torch.optim.lr_scheduler.LambdaLR",
               "no.such.Class",
               "torch.optim.lr_scheduler.MultiStepLR", "torch.optim.lr_scheduler.ChainedScheduler", "torch.optim.AdamW", "builtins.len",
               "\udcff",
               "torch.optim.lr_scheduler.SequentialLR", "torch.optim.lr_scheduler.ExponentialLR")  # fmt: skip
_SCHEDULE_ARGUMENTS = ("step_size=0", "step_size=-1", "step_size='a'", "step_size=1.5", "gamma=nan", "gamma=inf", "gamma=-1", "T_max=0",
                       "a=1", "=", "last_epoch=5",
                       "max_lr=0.1", "milestones=5", "milestones=[]", "lr_lambda=5", "num_cycles=0", "num_cycles=nan", "power=inf",
                       "power=1e308",
                       "num_cycles=1e308", "gamma=1e308", "gamma=None", "gamma=[]")  # fmt: skip
_MODULES = (
    "",
    " ",
    ".",
    "..",
    "a",
    "a.b",
    "os",
    "torch",
    "networks.lora",
    "musubi_tuner.networks.base",
    "\udcff",
    "../a",
    "a b",
    "n" * 5000,
    "sys.path",
)
_NETWORK = ("type=", "type=no", "type=lora", "preset=no", "rank_dropout=nan", "rank_dropout=2", "rank_dropout=-1", "module_dropout=1",
            "a=1", "=", "a", "type=lokr",
            "factor=0", "factor=-5", "factor=1e9", "include=[", "exclude=(", "include=*", "exclude=.*", "conv_dim=4", "type=full",
            "type=loha", "type=dora",
            "rank_dropout=five", "exclude_patterns=['(a+)+$']", "include_patterns=5", "loraplus_lr_ratio=nan", "loraplus_lr_ratio=-1",
            "loraplus_lr_ratio=1e308",
            "audio_dim=0", "audio_dim=-1", "block_dims=1,2", "block_dims=[]")  # fmt: skip
_SAMPLING = (
    "a=1",
    "=",
    "mean=nan",
    "std=0",
    "std=-1",
    "shift=0",
    "shift=nan",
    "shift=1e308",
    "scale=inf",
    "sigmoid_scale=nan",
    "logit_mean=1e308",
    "weight=five",
)
_NAMES = (
    "",
    " ",
    ".",
    "..",
    "a/b",
    "../a",
    "n" * 250,
    "n" * 256,
    "a\\b",
    "a\nb",
    "\udcff",
    "\x1b[31m",
    "*",
    "%s",
    "-a",
    "con",
    "a:b",
    "é",
    "\U0001f600" * 60,
    "/tmp/x",
)
_SPANS = ("0", "1", "-1", "1000", "1001", "999", "500", "nan", "1e308")


def systematic() -> Iterator[Malformed]:
    def made(label: str, *words: str, expect: str = "any", names: tuple[str, ...] = ()) -> Malformed:
        return Malformed(id=f"classes/{label!a}"[:200], program=TRAIN, more=words, expect=expect, names=names)

    def short(word: str) -> str:
        return word if len(word) < 60 else f"{word[:20]} x {len(word)}"

    optimizers = ("AdamW", "SGD", "Adafactor", "prodigy", "came", "adamwschedulefree", "prodigyplusschedulefree", "adamw8bit")
    for name in (*_OPTIMIZERS, *optimizers):
        yield made(f"--optimizer_type {short(name)}", f"--optimizer_type={name}", names=("optimizer_type",))
        yield made(
            f"--optimizer_type {short(name)} from a state", f"--optimizer_type={name}", "--resume", "state", "--max_train_steps", "3"
        )
    for optimizer in optimizers[:6]:
        for argument in _ARGUMENTS:
            yield made(
                f"{optimizer} with {short(argument)}",
                "--optimizer_type",
                optimizer,
                "--optimizer_args",
                argument,
                names=("optimizer_args",),
            )
    for name in _SCHEDULERS:
        yield made(f"--lr_scheduler_type {name}", f"--lr_scheduler_type={name}", names=("lr_scheduler",))
        for argument in _SCHEDULE_ARGUMENTS:
            yield made(
                f"{name} with {argument}", f"--lr_scheduler_type={name}", "--lr_scheduler_args", argument, "--max_train_steps", "2",
                names=("lr_scheduler", "learning_rate", "loss"),
            )  # fmt: skip
    for name in ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"):
        for argument in _SCHEDULE_ARGUMENTS:
            yield made(f"{name} with {argument}", "--lr_scheduler", name, "--lr_scheduler_args", argument, names=("lr_scheduler",))
        for flag in ("--lr_warmup_steps", "--lr_decay_steps"):
            for number in ("1", "0.5", "1e308", "-1", "1e-320", "0.999999"):
                yield made(f"{name} {flag} {number}", "--lr_scheduler", name, f"{flag}={number}", "--max_train_steps", "2")
    for name in _MODULES:
        yield made(f"--network_module {short(name)}", f"--network_module={name}", expect="refused", names=("network_module",))
    for argument in _NETWORK:
        yield made(f"--network_args {argument}", "--network_args", argument, names=("network_args",))
        yield made(f"--network_args {argument} for connectors", "--network_args", argument, "--train_connectors")
    for argument in _SAMPLING:
        for sampling in ("sigma", "uniform", "shift", "sigmoid", "logit_normal"):
            yield made(f"{sampling} with {argument}", "--timestep_sampling", sampling, "--timestep_args", argument, names=("timestep",))
    for name in _NAMES:
        yield made(f"--output_name {short(name)}", f"--output_name={name}", names=("output_name",))
        yield made(f"--output_name {short(name)} with states", f"--output_name={name}", "--save_state", "--sample_prompts", "prompts.txt")
    for low in _SPANS:
        for high in _SPANS:
            yield made(f"timesteps {low} to {high}", f"--min_timestep={low}", f"--max_timestep={high}")
