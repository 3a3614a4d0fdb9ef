"""Tuning: the trials of an Optuna study, each an ordinary run in the study's folder.

However many processes work on a study, on one machine or on several, a trial is one's alone: it holds the trial's lock,
which the operating system takes from it when it ends, however it ends. A trial that is running by the study's book and
whose lock is free has lost its process, and whoever finds it goes on with it from the state that its run has saved.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import optuna
import torch
import yaml
from filelock import FileLock, Timeout
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalRedisBackend
from optuna.trial import Trial, TrialState
from pydantic import PositiveInt, ValidationError
from rich.console import Console

from detkit import checkpoint, config, space, train, trials
from detkit.console import bar, ranks
from detkit.errors import Interrupted, UserError
from detkit.files import atomic_write, whole_folder

PLAN, JOURNAL = "study.yaml", "study.journal"
Objective = Literal["mAP", "mAP50", "mAP75", "VOC_AP50", "AR"]
Sampler = Literal["tpe", "random", "grid"]
Pruner = Literal["median", "hyperband", "none"]
_ALIKE, _FAILURES = 5, 100  # in a row for one reason, or for any, after which a process gives up
_LOCAL = ("runs", "data.root", "data.cache", *train.CHANGEABLE)  # what may differ between the machines of a study


class Plan(config.Settings):
    """What a study is, whoever works on it. start: the config as given. space: as in its file. epochs: a trial's; None:
    the config's."""

    start: config.Config
    space: dict[str, Any]
    epochs: PositiveInt | None = None
    objective: Objective = "mAP"
    sampler: Sampler = "tpe"
    pruner: Pruner = "median"
    seed: int = 0

    def digest(self) -> str:
        """The same on all machines."""
        tree = self.model_dump(mode="json")
        for name in _LOCAL:
            config.put(tree["start"], name, None)
        return hashlib.sha256(yaml.safe_dump(tree).encode()).hexdigest()

    def shortened(self) -> config.Config:
        """The config of the first trial: as long as trials are, and what is counted in steps or epochs in proportion.
        Raises UserError for a config whose length is in iterations."""
        cfg = self.start.train
        if self.epochs is None:
            return self.start
        if cfg.epochs is None:
            raise UserError("--epochs is for a config of train.epochs; here, set train.iterations")
        share = self.epochs / cfg.epochs
        if "train.epochs" in self.space:
            raise UserError("--epochs: the search space varies train.epochs itself; leave one of them out")
        changes = {
            "epochs": self.epochs,
            "eval_every": max(1, round(cfg.eval_every * share)),
            "unfreeze": tuple((round(epoch * share), stages) for epoch, stages in cfg.unfreeze),
            "schedule": cfg.schedule.model_copy(update={"warmup_steps": round(cfg.schedule.warmup_steps * share)}),
        }
        augment = self.start.augment
        augment = augment.model_copy(update={"close_epochs": round(augment.close_epochs * share)})
        return self.start.model_copy(update={"train": cfg.model_copy(update=changes), "augment": augment})


class _JournalLock(JournalFileOpenLock):
    """The lock on a journal. Optuna's own stays behind when its holder is killed; and half a line that a kill, or a
    crash of the machine, has left would spoil the next one's."""

    def __init__(self, journal: Path, lock: Path) -> None:
        self._journal, self._lock = journal, FileLock(lock)

    def acquire(self) -> bool:
        """Wait for it, and cut off half a line."""
        self._lock.acquire()
        with self._journal.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            if size and (file.seek(size - 1), file.read(1))[1] != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Let others have it."""
        self._lock.release()


def create(folder: Path, plan: Plan) -> None:
    """Make the folder of a new study; leave that of the same study as it is. Raises UserError where it is of another
    one, or of something else, and where the plan is impossible."""
    searched = space.parse(plan.space, plan.shortened(), "search space")
    if plan.sampler == "grid":
        space.combinations(searched, "search space")
    where = plan.start.data
    paths = {name: path.absolute() for name in ("root", "cache") if (path := getattr(where, name))}
    start = plan.start.model_copy(update={"data": where.model_copy(update=paths)})
    plan = plan.model_copy(update={"start": start})  # so that it can be gone on with from any folder
    given = plan.model_dump(mode="json")
    try:
        with whole_folder(folder) as new:
            atomic_write(new / PLAN, yaml.safe_dump(given, sort_keys=False, allow_unicode=True))
    except UserError:
        if not (folder / PLAN).is_file():
            raise
    known = read(folder).model_dump(mode="json")
    if (name := _difference(known, given)) is not None:
        now, then = (_short(space.value_at(tree, name)) for tree in (given, known))
        raise UserError(
            f"{folder}: the study there has {name.removeprefix('start.')} {then}, not {now}: name another with "
            f"--study, or go on with it by  detkit tune --resume {folder}"
        )


def newest(runs: Path = Path("runs")) -> Path:
    """The folder of the study that was worked on last. Raises UserError where there is none."""
    found = [path.parent for path in runs.glob(f"*/{PLAN}")]
    if not found:
        raise UserError(f"{runs}: no study to go on with")
    return max(found, key=lambda folder: folder.stat().st_mtime_ns)


def read(folder: Path) -> Plan:
    """The plan of the study in a folder. Raises UserError where there is none."""
    path = folder / PLAN
    try:
        return Plan.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError:
        raise UserError(f"{folder}: no study of detkit tune: it has no {PLAN}") from None
    except (yaml.YAMLError, ValidationError) as error:
        raise UserError(f"{path}: damaged: {str(error).splitlines()[0]}") from None


def _difference(one: Any, other: Any, name: str = "") -> str | None:
    """The dotted name of the first thing in which two trees differ; None where they don't."""
    if one == other:
        return None
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return next(found for key in one if (found := _difference(one[key], other[key], f"{name}.{key}")))
    return name.lstrip(".")


def _short(value: object) -> str:
    return f"{space.label(value)!s:.40}"


def _storage(url: str | None, folder: Path) -> optuna.storages.BaseStorage:
    """The book of a study: by default a journal in its folder, which kills and network file systems don't hurt."""
    if url is None or "://" not in url:
        path = folder / JOURNAL if url is None else Path(url).absolute()
        lock = folder / "locks" / "journal" if url is None else path.with_name(f"{path.name}.lock")
        return optuna.storages.JournalStorage(JournalFileBackend(str(path), _JournalLock(path, lock)))
    try:
        if url.startswith("redis"):
            return optuna.storages.JournalStorage(JournalRedisBackend(url))
        wait = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
        return optuna.storages.RDBStorage(url, engine_kwargs=wait)
    except Exception as error:  # noqa: BLE001 - each database has its own kinds
        shown = url.partition("://")[0] + "://..." + url.rpartition("@")[2].partition("://")[2]  # not the password
        raise UserError(f"--storage {shown}: {(str(error) or type(error).__name__).splitlines()[0]:.200}") from None


class _Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM between trainings; not an Exception, for whatever is done then may catch those."""


class Study:
    """A study as one process works on it. storage: of Optuna; None: the journal in the folder. most: trials in all."""

    def __init__(self, folder: Path, storage: str | None, most: int, console: Console, ends: float) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", module="optuna")
        self.folder, self.plan = folder.absolute(), read(folder)
        self.most, self.console, self.ends = most, console, ends
        self.shared = storage is not None  # there may be trials of other machines, whose folders are not here
        self.start = self.plan.shortened()
        self.space = space.parse(self.plan.space, self.start, str(folder / PLAN))
        (folder / "locks").mkdir(exist_ok=True)
        with self._locked():
            self.study = optuna.create_study(
                storage=_storage(storage, folder),
                study_name=folder.absolute().name,
                direction="maximize",
                load_if_exists=True,
                pruner=self._pruner(),
            )
            self._prepare()

    def _locked(self) -> FileLock:
        """To be held while trials are given out and results are written; of this machine's, or of those with a common
        folder."""
        return FileLock(self.folder / "locks" / "study")

    def _pruner(self) -> optuna.pruners.BasePruner:
        cfg = self.start.train
        match self.plan.pruner:
            case "median":
                return optuna.pruners.MedianPruner(n_warmup_steps=(cfg.epochs or 0) // 4)
            case "hyperband":
                return optuna.pruners.HyperbandPruner(min_resource=cfg.eval_every, max_resource=cfg.epochs or "auto")
            case "none":
                return optuna.pruners.NopPruner()

    def _prepare(self) -> None:
        """Queue the starting configuration, and the whole grid, once; refuse the study of another plan."""
        known, digest = self.study.user_attrs.get("plan"), self.plan.digest()
        if self.shared and known not in (None, digest):
            raise UserError(f"the study {self.folder.name} in --storage has another plan: name yours with --study")
        grid = space.combinations(self.space, PLAN) if self.plan.sampler == "grid" else None
        if known:
            return
        first = space.starting(self.space, self.start)
        self.study.enqueue_trial(first, {"start": [*first]}, skip_if_exists=True)
        for params in trials.shuffled(grid, self.plan.seed) if grid else ():
            if params != first:
                self.study.enqueue_trial(params, skip_if_exists=True)
        self.study.set_user_attr("plan", digest)

    def work(self, stopped: Sequence[int] = ()) -> None:
        """Run trials until there are enough, the time is up, or a signal's number has come into `stopped`. Raises
        UserError where it makes no sense to go on, and Interrupted when stopped."""
        reasons: list[str] = []
        while time.time() < self.ends:
            if stopped:
                raise Interrupted("", stopped[0])
            with self._claimed() as trial:
                if trial is None:
                    break
                reason = self._run(trial)
                reasons = [*reasons, reason] if reason else []
            with self._locked():
                trials.write(self.folder, self.plan, self.space, self.study.get_trials(deepcopy=False))
            if reasons[-_ALIKE:] == [reason] * _ALIKE or len(reasons) == _FAILURES:
                raise UserError(f"{self.folder}: too many trials in a row have failed: {reason}")

    @contextmanager
    def _claimed(self) -> Iterator[Trial | None]:
        """Within, a trial is this process' own: one that has lost its process, or a new one; None: there is none."""
        with self._locked():
            trial, lock = self._abandoned() or self._new()
        try:
            yield trial
        except (UserError, Interrupted):
            raise
        except Exception as error:  # a defect: whoever goes on is not to meet it again
            if trial:
                self._told(trial, TrialState.FAIL, f"{type(error).__name__}: {error}")
            raise
        finally:
            if lock:
                lock.release()

    def _lock(self, number: int) -> FileLock:
        return FileLock(self.folder / "locks" / f"trial-{number}", timeout=0)

    def _abandoned(self) -> tuple[Trial | None, FileLock | None] | None:
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            lock = self._lock(frozen.number)
            if self.shared and not Path(lock.lock_file).exists():
                continue  # another machine's
            with suppress(Timeout):
                lock.acquire()
                self._seed(frozen.number)
                return Trial(self.study, frozen._trial_id), lock
        return None

    def _new(self) -> tuple[Trial | None, FileLock | None]:
        known = self.study.get_trials(deepcopy=False)
        begun = sum(frozen.state not in (TrialState.WAITING, TrialState.FAIL) for frozen in known)
        queued = any(frozen.state == TrialState.WAITING for frozen in known)
        if begun >= self.most or (self.plan.sampler == "grid" and not queued):
            return None, None
        trial = self.study.ask()
        lock = self._lock(trial.number)
        lock.acquire()
        self._seed(trial.number)
        return trial, lock

    def _seed(self, number: int) -> None:
        """Let what is drawn depend on the seed, the trial and those before it, not on the process."""
        seed = (self.plan.seed * 1_000_003 + number) % 2**32
        sampler = optuna.samplers.TPESampler if self.plan.sampler == "tpe" else optuna.samplers.RandomSampler
        self.study.sampler = sampler(seed=seed)

    def _params(self, trial: Trial) -> dict[str, Any]:
        """The trial's values; of the starting configuration those that the space has."""
        own = trial.user_attrs.get("start", self.space)
        params: dict[str, Any] = {}
        for name, values in self.space.items():
            if name not in own:
                continue
            if isinstance(values, space.Choices):
                params[name] = trial.suggest_categorical(name, [*values.values])
            elif values.whole:
                step = int(values.step or 1)
                params[name] = trial.suggest_int(name, int(values.low), int(values.high), step=step, log=values.log)
            else:
                params[name] = trial.suggest_float(name, values.low, values.high, step=values.step, log=values.log)
        return params

    def _run(self, trial: Trial) -> str | None:
        """Train a trial to its end, and enter it in the study's book. Returns why it failed, if it did."""
        params, name = self._params(trial), f"trial-{trial.number}"
        try:
            settings = self._settings(trial, params)
        except UserError as error:
            return self._told(trial, TrialState.FAIL, str(error))
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if frozen.params == params:
                trial.set_user_attr("reason", f"the same as trial {frozen.number}")
                self.study.tell(trial, frozen.value)
                return None
        self.console.print(f"{name}: {trials.words(params)}", highlight=False, markup=False)
        try:
            figure = self._train(trial, settings)
        except optuna.TrialPruned as pruned:
            self._told(trial, TrialState.PRUNED, str(pruned))
        except (UserError, torch.OutOfMemoryError) as error:
            return self._failed(trial, error)
        else:
            if figure is not None:
                self.study.tell(trial, figure)
                best = self.study.best_trial
                said = f"{self.plan.objective} {figure:.4f}   (best: {best.value:.4f}, trial {best.number})"
                self.console.print(f"{name}: {said}", highlight=False)
        return None

    def _settings(self, trial: Trial, params: Mapping[str, Any]) -> config.Config:
        """The config of a trial's run. Raises UserError where the values don't go together."""
        settings, name = self.start, f"trial-{trial.number}"
        if "start" not in trial.user_attrs:
            settings = space.applied(settings.model_dump(mode="json"), self.space, params, name)
        return settings.model_copy(update={"name": name, "runs": self.folder})

    def _failed(self, trial: Trial, error: Exception) -> str | None:
        """End a trial that can't be trained. Raises the error where it is the starting configuration's and no step has
        been made: then nothing can be trained, and the trial stays open until that is mended."""
        begun = self._folder(trial.number) is not None
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            self._told(trial, TrialState.PRUNED, "the device's memory is too small")
            return None
        if "start" in trial.user_attrs and not begun:
            raise error
        return self._told(trial, TrialState.PRUNED if begun else TrialState.FAIL, str(error))

    def _told(self, trial: Trial, state: TrialState, reason: str) -> str:
        """End a trial that has no figure."""
        trial.set_user_attr("reason", reason)
        self.study.tell(trial, state=state)
        how = "pruned" if state == TrialState.PRUNED else "failed"
        self.console.print(f"trial-{trial.number}: {how}: {reason}", highlight=False, markup=False)
        return reason

    def _folder(self, number: int) -> Path | None:
        """The newest run of a trial that can be gone on with."""
        runs = [path.parent for path in self.folder.glob(f"trial-{number}-*/{checkpoint.STATE}")]
        return max(runs, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def _train(self, trial: Trial, settings: config.Config) -> float | None:
        """Train a trial's run, from where it was left; its figure, or None where the time was up before its end."""
        begun, finished = self._folder(trial.number), False
        with bar(self.console) as progress, (self.folder / f"{settings.name}.log").open("a", encoding="utf-8") as log:
            task = progress.add_task(settings.name, total=settings.train.epochs)

            def judge(run: train.Run, figures: dict[str, Any]) -> None:
                nonlocal finished
                finished = run.finished
                self._judged(trial, run, figures)
                progress.update(task, completed=run.epoch, total=run.epochs)

            console = Console(file=log, width=200)
            if begun is None:
                begun = train.start(settings, console, self.ends, judge)
            elif checkpoint.read_state(begun)[0]["finished"]:
                finished = True
            else:
                train.resume(begun, console, (), self.ends, judge)
        if not finished:
            return None
        return float(checkpoint.read(begun / checkpoint.BEST).metrics[self.plan.objective])

    def _judged(self, trial: Trial, run: train.Run, figures: dict[str, Any]) -> None:
        """Report an evaluation. Raises TrialPruned where the trial is not worth going on with."""
        figure = figures[self.plan.objective]
        trial.report(figure, run.epoch)
        if run.finished or "start" in trial.user_attrs:
            return
        if trial.should_prune():
            raise optuna.TrialPruned(f"{self.plan.objective} {figure:.4f} after epoch {run.epoch} of {run.epochs}")


def run(
    folder: Path,
    console: Console,
    *,
    most: int = 30,
    jobs: int = 1,
    storage: str | None = None,
    ends: float | None = None,
) -> None:
    """Work on the study in a folder (see `create`) until it has so many trials, and say what came of it.

    jobs: processes. ends: the time (as time.time() has it) after which no step begins. Raises UserError for the user's
    mistakes, Interrupted when stopped; then the same call goes on.
    """
    if ranks() > 1:
        raise UserError("detkit tune trains a trial in one process: start it without torchrun, with --jobs")
    ends = float("inf") if ends is None else ends
    study = Study(folder, storage, most, console, ends)
    again = f"detkit tune --resume {folder}" + " --storage URL" * (storage is not None)
    try:
        with _signals() as stopped:
            if jobs == 1:
                study.work(stopped)
            else:
                _in_processes(folder, storage, most, ends, jobs)
    except Interrupted as stop:
        raise Interrupted(f"stopped; go on with  {again}", stop.exit_code - 128) from None
    except _Stopped:
        raise Interrupted(f"stopped; go on with  {again}", stopped[0]) from None
    finally:
        with study._locked():
            frozen = study.study.get_trials(deepcopy=False)
            trials.write(study.folder, study.plan, study.space, frozen)
    if time.time() >= ends:
        console.print(f"the time is up; go on with  {again}", style="yellow", highlight=False)
    trials.report(folder, study.plan, study.study, console)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Within, Ctrl-C and SIGTERM raise _Stopped, but while a run is training, which ends by itself. Gives the list that
    their numbers go into: what is raised in a finaliser is lost."""
    received: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        raise _Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_processes(folder: Path, storage: str | None, most: int, ends: float, jobs: int) -> None:
    """Work in so many processes. Raises UserError where one has failed, once the others are done."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_job, args=(folder, storage, most, ends, job)) for job in range(jobs)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    finally:
        running = [process for process in processes if process.is_alive()]
        for process in running:
            process.terminate()
        for process in running:
            process.join()
    failed = [process.exitcode for process in processes if process.exitcode]
    if failed:
        raise UserError(f"{len(failed)} of {jobs} processes ended early (exit code {failed[0]}); see above")


def _job(folder: Path, storage: str | None, most: int, ends: float, job: int) -> None:
    """One process of several."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[job % len(gpus.split(","))]
    try:
        with _signals() as stopped:
            console = Console(width=None if sys.stdout.isatty() else 200)
            Study(folder, storage, most, console, ends).work(stopped)
    except (Interrupted, _Stopped):
        sys.exit(128 + signal.SIGTERM)
    except UserError as error:
        print(f"detkit: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    signal.raise_signal(signal.SIGTERM)
