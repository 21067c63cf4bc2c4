"""The life of a generation, which is the same in all WebUIs.

A generation is a ``p`` (StableDiffusionProcessing).  Each of its batches ends in ``p.sample(...)``, the only call
whose exceptions reach the user: the side model is loaded there, and faults are raised there.  In between, the
samplers' callbacks find the run on their ``p``.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from modules import shared

from lib_delta.errors import AdapterError, DeltaError, SettingError, clear_frames
from lib_delta.hosts.generation import heatmap_picture, nested_runs, prompt_tags
from lib_delta.hosts.generation.batch_request import leaves_out_adaptation, read_passes, reading_error, request_fields
from lib_delta.hosts.generation.infotext import Infotext, clear_infotext, write_not_applied
from lib_delta.hosts.generation.nested_runs import LastRun
from lib_delta.hosts.generation.state import REQUEST_ATTRIBUTE, RUN_ATTRIBUTE, clear_request, request_of
from lib_delta.hosts.generation.xyz_cell import LastCell, error_images, is_xyz_cell
from lib_delta.hosts.settings import max_cached_bases, one_of
from lib_delta.request.infotext import NOT_APPLIED
from lib_delta.request.passes import Passes
from lib_delta.request.request import Request
from lib_delta.request.setting_choices import ON_ERROR, STOP

if TYPE_CHECKING:
    from torch import Tensor

    from lib_delta.hosts.base import Host
    from lib_delta.hosts.generation.run import Run

OFFLOADING = "taking the side model of Delta Sampling away"


class Lifecycle:
    """The script's hooks, from the accordion's arguments to the finished pictures."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._infotext = Infotext(host.catalog, host.units)
        self._last_run = LastRun()
        self._last_cell = LastCell()
        self._sampling = 0

    @property
    def sampling(self) -> bool:
        """Whether a generation works with side models now; one can run within another."""
        return self._sampling > 0

    def last_run(self) -> list[str]:
        """Return the last run's outcome, in lines for the status."""
        return self._last_run.lines()

    def process(self, p: Any, arguments: Sequence[Any]) -> None:
        """Read a generation's request; errors in it are raised when it samples."""
        if not nested_runs.is_copy(p):  # the run that a copy was made from still has to write its infotext
            clear_infotext(p)
            self._last_run.begin(p)
            nested_runs.begin(p)
        try:
            axes = self._last_cell.axes_of(p)
            setattr(p, REQUEST_ATTRIBUTE, Request.from_arguments(arguments, **request_fields(axes)))
        except Exception as error:  # the WebUI would swallow it, and make a plain picture
            setattr(p, REQUEST_ATTRIBUTE, reading_error(error))

    def process_batch(self, p: Any) -> None:
        """Prepare a batch: its tags are known now, and the WebUI writes ``params.txt`` next."""
        if nested_runs.is_copy(p):  # it generates, and gets an infotext of its own
            p.extra_generation_params = dict(p.extra_generation_params)
            nested_runs.begin(p)
        clear_infotext(p)  # of the batch before
        try:
            self._process_batch(p)
        except Exception as error:  # as in process
            clear_infotext(p)
            self._wrap_sample(p, reading_error(error))

    def _process_batch(self, p: Any) -> None:
        request = request_of(p)
        if request is None:
            return
        for sentence in prompt_tags.drop_ignored_tags(p, getattr(p, "iteration", 0)):
            p.comment(f"Delta Sampling: {sentence}.")
        passes = request if isinstance(request, DeltaError) else read_passes(p, request)
        if isinstance(passes, Passes) and isinstance(request, Request):
            self._infotext.write(p, passes, request)
            if not passes.wanted:
                if passes.first.enabled or passes.hires.enabled:
                    self._last_run.report(p, "no delta was requested: lambda is 0")
                return
        self._wrap_sample(p, passes)

    def _wrap_sample(self, p: Any, passes: Passes | DeltaError) -> None:
        """Put the delta around this batch's ``p.sample``, on the instance and until the first call."""
        replaced = vars(p).get("sample")  # another extension may have done the same
        sample, restore_schedule = p.sample, self._host.keep_schedule(p)

        def sample_with_delta(*arguments: Any, **named: Any) -> Tensor | list[Tensor]:
            if replaced is None:
                vars(p).pop("sample", None)
            else:
                p.sample = replaced
            try:
                return self._sample(p, passes, partial(sample, *arguments, **named))
            except DeltaError as error:
                restore_schedule()
                clear_frames(error)
                self._host.free_memory()
                self._last_run.report(p, f"no delta: {error}")
                if not is_xyz_cell(p):
                    self._last_run.end(p)
                    raise
                return self._cell_of_error(p, passes, error)
            except BaseException:
                restore_schedule()
                self._last_run.end(p)
                raise

        p.sample = sample_with_delta

    def _cell_of_error(self, p: Any, passes: Passes | DeltaError, error: DeltaError) -> list[Tensor]:
        """Return a cell's pictures that show an error: the plot would print it, and leave the cell black."""
        write_not_applied(p, error)
        if isinstance(passes, Passes):
            self._infotext.write_for_grid(p, passes)
        return error_images(p, str(error))

    def _sample(self, p: Any, passes: Passes | DeltaError, sample: Callable[[], Tensor]) -> Tensor:
        from lib_delta.hosts.generation.run import StopSampling

        if isinstance(passes, DeltaError):
            raise passes
        if leaves_out_adaptation(p, passes):
            self._clear_infotext(p, passes)
            return sample()  # the plain picture
        self._sampling += 1
        try:
            run = self._prepare(p, passes)
            if run is None:
                return sample()
            setattr(p, RUN_ATTRIBUTE, run)
            try:
                latents = sample()
                run.read()  # the last step's statistics
                return latents
            except StopSampling as stop:
                raise stop.error from stop.error.__cause__
            finally:
                delattr(p, RUN_ATTRIBUTE)
                self._finish(p, run)
        finally:
            self._sampling -= 1

    def _prepare(self, p: Any, passes: Passes) -> Run | None:
        """Return the batch's run; None if preparing it failed and the user wants to go on without a delta."""
        from lib_delta.hosts.generation.prepare import prepare_run
        from lib_delta.runtime.side_model import user_error

        shared.state.textinfo = "Delta Sampling: loading the side model"
        try:
            return prepare_run(self._host, p, passes, partial(self._on_fault, p))
        except Exception as error:  # the user reads every error
            fault = user_error(error, "loading the side model of Delta Sampling")
            # The base is not to blame for a wrong setting or adapter, and stays cached.
            if not (isinstance(fault, (SettingError, AdapterError)) and max_cached_bases()):
                self._host.free_side_models()
            self._last_run.report(p, f"no step had the delta: {fault}")
            if isinstance(fault, SettingError) or one_of("on_error", ON_ERROR) == STOP:
                raise fault from None if fault is error else error
            write_not_applied(p, fault)
            self._infotext.write_for_grid(p, passes)
            _go_on_without(p, fault, error)
            clear_frames(error)
            return None
        finally:
            shared.state.textinfo = None

    def _on_fault(self, p: Any, fault: DeltaError) -> None:
        """Stop sampling for a fault in a step, or go on without the delta."""
        from lib_delta.hosts.generation.run import StopSampling

        if one_of("on_error", ON_ERROR) == STOP:
            raise StopSampling(fault)
        _go_on_without(p, fault, fault.__cause__ or fault)

    def _finish(self, p: Any, run: Run) -> None:
        """Report a run's outcome, and take its side model away if memory is short."""
        run.interrupted = bool(shared.state.interrupted or shared.state.skipped)
        if run.applied and run.heat is not None and run.heat.steps:
            run.afterwards("keeping the picture of the delta", partial(heatmap_picture.store_maps, p, run.heat))
        if not run.applied:
            self._clear_infotext(p, run.passes)
            if run.fault is None and run.reason():
                p.comment(f"Delta Sampling: {run.reason()}: the picture is as it would be without it.")
        if run.fault is not None and one_of("on_error", ON_ERROR) != STOP:
            p.extra_generation_params[NOT_APPLIED] = str(run.fault)
        leave = self._host.free_side_models if run.fault is not None else partial(self._host.leave, run.model)
        run.afterwards(OFFLOADING, leave)
        for remark in run.remarks:
            p.comment(f"Delta Sampling: {remark}.")
        self._last_run.report(p, run.summary())

    def _clear_infotext(self, p: Any, passes: Passes) -> None:
        """Remove a batch's request from its infotext; a plot's grid still has it."""
        clear_infotext(p)
        self._infotext.write_for_grid(p, passes)

    def postprocess(self, p: Any, processed: Any) -> None:
        """Show the maps of the delta next to a generation's pictures, and end it."""
        if nested_runs.is_copy(p):
            return
        heatmap_picture.show_maps(p, processed)
        clear_request(p)
        nested_runs.end(p)
        self._last_run.end(p)
        if max_cached_bases() == 0 and not self.sampling:
            self._host.free_side_models()


def _go_on_without(p: Any, fault: DeltaError, error: BaseException) -> None:
    print(f"Delta Sampling: {fault}; going on without it", file=sys.stderr)
    traceback.print_exception(type(error), error, error.__traceback__)
    p.comment(f"Delta Sampling: {fault}. The picture was made without it.")
