"""What the command-line programs share: reading flags, and errors as one line with an exit code."""

import contextlib
import copy
import importlib.metadata
import inspect
import os
import re
import runpy
import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from default_moe.compilation_cache import FOLDER, keep_compiled_programs
from default_moe.config import Config, check_keys, default_config, describe_settings, to_config_dict
from default_moe.errors import (
    AnotherProcessFailed,
    CheckpointError,
    ConfigError,
    TrainingFailed,
    check,
    quoted,
    shown,
    tell,
)
from default_moe.methods import METHODS
from default_moe.methods.plugins import load_plugin
from default_moe.methods.settings import path_fault
from default_moe.processes import distributed
from default_moe.processes.huge_pages import restart_with_huge_pages

BAD_INPUT = 2
_FILE_FLAGS = ("--config=", "-config=")


def run(main: Callable[[list[str]], int], many_processes: bool = False, cached: bool = True) -> None:
    """Run a program on the command line's arguments and exit with its code.

    many_processes: join those that were started with this one, by flags or on a cluster.
    cached: keep what is compiled for the next start.
    Bad input prints one line and exits with 2, a run that failed with 1, Ctrl-C with 130; all processes do if one does.
    """
    _open_streams()
    if getattr(sys.modules["__main__"], "main", None) is main:
        restart_with_huge_pages()
    sys.argv = _file_first(sys.argv)  # where config_flags looks too
    try:
        own = _define_flags(many_processes, cached)
        for arg in sys.argv:
            if re.match("--?config[.]moe[.]plugin=.", arg):
                load_plugin(arg.partition("=")[2])  # now, for its settings may be among the flags
        if {"--help", "-help", "-h"} & set(sys.argv):
            code = _help(main)
            sys.stdout.flush()  # that nobody reads it is seen here, however short it is
        else:
            _start(sys.argv, own)
            code = main(sys.argv)
            distributed.finish()
    except (ConfigError, CheckpointError, flags.Error) as error:
        code = _report(error, BAD_INPUT)
    except TrainingFailed as error:
        code = _report(error, 1)
    except AnotherProcessFailed:
        distributed.end_after_another()
    except KeyboardInterrupt as error:
        said = str(error) or "the same command starts again or continues"
        _report(KeyboardInterrupt(f"interrupted; {said}"), 128 + signal.SIGINT)
        _flush_streams()
        os._exit(128 + signal.SIGINT)  # an orderly exit crashes if a compilation was interrupted
    except Exception as error:
        if distributed.several():
            distributed.fail_after(error)
        if isinstance(error, BrokenPipeError):  # nobody reads what is printed any more
            code = 128 + signal.SIGPIPE
        elif isinstance(error, OSError):
            code = _report(error, 1)
        elif traceback.extract_tb(error.__traceback__)[-1].filename.endswith("xla_bridge.py"):
            asked = f"JAX finds no device with JAX_PLATFORMS={quoted(os.environ.get('JAX_PLATFORMS', ''))}"
            code = _report(ConfigError(f"{asked}: {str(error) or 'unset it to take those that are there'}"), BAD_INPUT)
        else:
            raise
    _flush_streams()
    sys.exit(code)


def _open_streams() -> None:
    """Give a program that was started without standard streams (`>&-`) some: a file would get their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    streams: list[Any] = [sys.stdout, sys.stderr]
    for stream in streams:
        with contextlib.suppress(OSError, AttributeError):  # a stream that is broken, or none of Python's own
            stream.reconfigure(errors="backslashreplace")  # letters that the terminal does not know


def _flush_streams() -> None:
    """What cannot be printed is lost. Python itself would exit with another code for it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def parse_config(
    argv: list[str], flag: Any, default: str, adjust: Callable[[Any], None] = lambda config_dict: None
) -> Config:
    """The Config of a `--config` flag made with `DEFINE_config_file`, after parsing all flags of `argv`.

    adjust: may change the ConfigDict before it is checked.
    `default` is the config file when none is given. (As the flag's own default it would be loaded, and checked against
    the overrides, even when another file is asked for.) Raises ConfigError or flags.Error.
    """
    config_dict = parse_config_dict(argv, flag, default, adjust)
    config = Config.from_config_dict(config_dict)
    for line in _unused(config_dict, config):
        tell(line)
    return config


def parse_config_dict(
    argv: list[str], flag: Any, default: str, adjust: Callable[[Any], None] = lambda config_dict: None
) -> Any:
    """The ConfigDict from which `parse_config` makes a Config: settings of all methods, checked for the one in use."""
    given = [arg for arg in argv if arg.startswith(_FILE_FLAGS)]
    file = _config_file(given[0].split("=", 1)[1] if given else default)
    parse_flags([argv[0], f"--config={file}", *(arg for arg in argv[1:] if arg not in given[:1])])
    adjust(flag.value)
    Config.from_config_dict(flag.value)
    return flag.value


def _unused(config_dict: Any, config: Config) -> list[str]:
    """A line for each router method whose settings were changed though another is used."""
    used, defaults = config.moe.method.name, default_config().moe
    changed = [name for name in METHODS if name in defaults and config_dict.moe[name] != defaults[name]]
    return [f"note: moe.{name}.* is not used, since moe.router is {used!r}" for name in changed if name != used]


def parse_flags(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Parse all of the command line. Raises ConfigError on anything that is not right."""
    _check_keys(argv)
    rest = _parse(argv, values)
    if len(rest) > 1:
        raise ConfigError(f"{quoted(rest[1])} is not a flag: settings are given as --config.section.key=value")


def parse_known_flags(argv: list[str]) -> list[str]:
    """Parse the flags that the program defines; returns the others, with the program's name before them."""
    return _parse(argv, flags.FLAGS, known_only=True)


def parse_overrides(argv: list[str], config: Config, allowed: tuple[str, ...]) -> Config:
    """`config` with the --config.section.key=value of `argv`, all of which sys.argv must hold too.

    Raises ConfigError if a section is not in `allowed`.
    """
    values = flags.FlagValues()
    before = to_config_dict(config)
    _check_keys(argv)
    holder = config_flags.DEFINE_config_dict("config", copy.deepcopy(before), flag_values=values)
    parse_flags(argv, values)
    now = holder.value.to_dict()
    for section, saved in before.to_dict().items():
        if section not in allowed and now[section] != saved:
            name = f"{section}.*" if isinstance(saved, dict) else section
            raise ConfigError(f"{name} is fixed by the checkpoint; only {', '.join(allowed)} can be changed here")
    return Config.from_config_dict(holder.value)


def config_name(argv: list[str], default: str) -> str:
    """The stem of the config file that --config names: "paper" for configs/paper.py:8c1."""
    names = [arg.split("=", 1)[1] for arg in argv if arg.startswith(_FILE_FLAGS)]
    return Path((names or [default])[-1].split(":")[0]).stem


def path(flag: flags.FlagHolder, default: str = "") -> Path:
    """The path that a flag gives, or else the default. Raises ConfigError if no file can have that name."""
    return _path(flag.name, flag.value or default)


def paths(flag: flags.FlagHolder) -> list[Path]:
    """The paths that a flag gives which may be given several times. Raises ConfigError as `path` does."""
    return [_path(flag.name, value) for value in flag.value]


def file_to_write(flag: flags.FlagHolder) -> Path | None:
    """The file that a flag gives, None if it gives none. Raises ConfigError if it cannot be one."""
    if not flag.value:
        return None
    file = path(flag)
    folder = file.absolute().parent
    check(folder.is_dir(), f"cannot write {file}: there is no directory {folder}")
    check(not file.is_dir(), f"cannot write {file}: it is a directory")
    return file


def _path(name: str, value: str) -> Path:
    fault = path_fault(value)
    check(not fault, f"--{name} is {quoted(value)}, but must {fault}")
    return Path(value).expanduser()


def _parse(argv: list[str], values: flags.FlagValues, known_only: bool = False) -> list[str]:
    """Parse with absl, whose messages repeat what was given, however long that is. Raises ConfigError."""
    try:
        return values(argv, known_only=known_only)
    except flags.Error as error:
        message = str(error)
        for given in (arg.partition("=")[2] or arg for arg in argv):
            if len(given) > 100:
                message = message.replace(given, shown(given, 100)).replace(repr(given), quoted(given))
        raise ConfigError(shown(message, 500)) from None


def _define_flags(many_processes: bool, cached: bool) -> flags.FlagValues:
    """Define the flags that programs share. Returns them apart from the others too, for `_start`."""
    own = flags.FlagValues()
    for values in (own, flags.FLAGS):
        to: dict[str, Any] = {"flag_values": values, "module_name": __name__, "allow_override": True}
        if cached:
            told = f"Keep compiled programs in {FOLDER}; $JAX_COMPILATION_CACHE_DIR names another place."
            flags.DEFINE_bool("compilation_cache", True, told, **to)
        if many_processes:
            told = "HOST:PORT of process 0, any free port, if no cluster tells it."
            flags.DEFINE_string("coordinator", None, told, **to)
            told = "How many processes train as one, with --coordinator."
            flags.DEFINE_integer("num_processes", None, told, None, 10**6, **to)
            flags.DEFINE_integer("process_id", None, "Which of them this is, from 0 on.", None, 10**6, **to)
            flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for the others at the start.", 1, 10**6, **to)
    own.set_gnu_getopt(True)
    return own


def _start(argv: list[str], own: flags.FlagValues) -> None:
    """Join other processes, or else find compiled programs. Raises ConfigError or flags.Error."""
    # Parsed before all others, so that what is wrong with those in one process can be told to the other processes.
    _parse(argv, own, known_only=True)
    if "coordinator" in own:
        distributed.start(own.coordinator, own.num_processes, own.process_id, own.start_timeout)
    # Processes that train as one on GPUs tune kernels together: one that need not compile would leave others waiting.
    if "compilation_cache" in own and own.compilation_cache and not distributed.several():
        keep_compiled_programs(FOLDER)


def _help(main: Callable[[list[str]], int]) -> int:
    """Print what a program does, its flags and, if it has them all, the settings."""
    width = min(shutil.get_terminal_size((100, 0)).columns, 120)
    lines = [inspect.cleandoc(getattr(main, "__globals__", {}).get("__doc__") or ""), "", "Flags:"]
    of_module = flags.FLAGS.flags_by_module_dict()
    own = {module for module in of_module if module.startswith("default_moe.")} - {main.__module__, __name__}
    modules = (sys.argv[0], main.__module__, *sorted(own), __name__)
    for flag in (flag for module in modules for flag in of_module.get(module, ())):
        default = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
        lines.append(f"  --{flag.name}" + (f"={default}" if default is not None else ""))
        lines += textwrap.wrap(flag.help, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if "config" in flags.FLAGS:
        lines += ["", "Settings, with the defaults that hold where a config file does not set them:", ""]
        lines.append(describe_settings(width))
    else:
        lines += ["", "`python -m default_moe.train --help` lists the settings, --config.*."]
    print("\n".join(lines))
    return 0


def _file_first(argv: list[str]) -> list[str]:
    """`argv` with its --config=FILE (or --config FILE) before all else: config_flags takes overrides after it only."""
    joined: list[str] = []
    for arg in argv:
        if joined and joined[-1] in ("--config", "-config"):
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    return [joined[0], *sorted(joined[1:], key=lambda arg: not arg.startswith(_FILE_FLAGS))]


def _check_keys(argv: list[str]) -> None:
    """Raises ConfigError if a --config.section.key of `argv` names no setting."""
    names = [arg.split("=")[0] for arg in argv if re.match(r"--?(no)?config\.", arg)]
    for name in names:
        section: Any = default_config()
        prefix = ""
        for part in name.split(".")[1:]:
            check_keys({part: None}, list(section) if isinstance(section, ConfigDict) else [], prefix)
            section, prefix = section[part], f"{prefix}{part}."


def _config_file(name: str) -> str:
    """Return "FILE.py" or "FILE.py:ARGUMENT" with the file's path: one of ours is found from any folder.

    Raises ConfigError if it gives no config; flags would report it with a traceback.
    """
    path, *argument = name.split(":", 1)
    if not os.path.isfile(path):
        path = next((str(file) for file in _our_files() if str(file).endswith(f"/{path}") and file.is_file()), path)
    check(os.path.isfile(path), f"there is no config file {quoted(path)} (looked from {Path.cwd()})")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise ConfigError(f"the config file {path} has no get_config(), which returns the config")
        try:
            inspect.signature(get_config).bind(*argument)
        except TypeError:
            given = f"the argument {quoted(argument[0])}" if argument else "no argument, which would follow a colon"
            raise ConfigError(f"the config file {path} cannot be called with {given}") from None
        config = get_config(*argument)
        check(isinstance(config, ConfigDict), f"get_config() of {path} returns no ConfigDict: {quoted(config)}")
        return ":".join([path, *argument])
    except ConfigError:
        raise
    except SyntaxError as error:
        raise ConfigError(
            f"the config file {error.filename or path} is not Python: {error.msg}, line {error.lineno}"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from None
    except Exception as error:  # of a locked ConfigDict for example
        frames = traceback.extract_tb(error.__traceback__)
        line = [frame for frame in frames if "ml_collections" not in frame.filename][-1]
        reason = textwrap.shorten(str(error).replace("\\n", " ") or type(error).__name__, 100)
        raise ConfigError(f"{line.filename}, line {line.lineno}, {line.line!r}: {reason}") from None


def _our_files() -> list[Path]:
    """The config files of the clone that this is, or those that were installed with the package."""
    here = sorted(Path(__file__).parents[1].glob("configs/*.py"))
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        installed = importlib.metadata.files("default_moe") or ()
        here += [Path(str(file.locate())) for file in installed if file.parent.name == "configs"]
    return here


def _report(error: BaseException, code: int) -> int:
    message = str(error).rstrip()
    if code == BAD_INPUT:
        message = shown(message, 2000)
    if distributed.several():
        distributed.fail(message, code)
    tell(f"error: {message}")
    return code
