"""Serves a run's pages while they are being made, by a thread of this process: there is one copy of JAX.

Until there is a table of neurons, every page says how far the work is; then the explorer's own take its
place, and again when ablation effects have come. The work ends where it next tells of itself: all that it
writes, it writes whole.
"""

from collections.abc import Callable
import contextlib
import threading
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from topklm.errors import EXIT_INTERRUPTED, UserError, end_at_once
from topklm.explorer import app, pages
from topklm.explorer.neuron_data import NeuronData
from topklm.neurons import NeuronsFolder
from topklm.progress import Progress, StoppedError, WatchedProgress
from topklm.web.http import Json

# Does the work; tells when pages can be shown, and returns when nothing is missing.
Work = Callable[[Progress, Callable[[NeuronsFolder], None]], NeuronsFolder]


class Preparing:
    """The application of the moment, and the thread whose `work` harvests and measures what it shows."""

    def __init__(self, run: str, work: Work, progress: Progress):
        self.progress = WatchedProgress(progress)
        self.problem = ""  # why a part of the figures is missing for good
        self._work = work
        self._made = 0  # how often there was more to show
        self._error: BaseException | None = None
        self._static = pages.Static()
        template = pages.templates().get_template("preparing.html")
        self._render = lambda **content: template.render(run=run, static=self._static.address, **content)
        waiting = [
            Route("/api/progress", self.answer),
            Route(self._static.route, self._static.answer),
            Route("/{path:path}", self._page, methods=["GET", "POST"]),
        ]
        self._current: ASGIApp = Starlette(routes=waiting)
        self._explorer: Starlette | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._end: Callable[[], None] = lambda: None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request with what there is."""
        await self._current(scope, receive, send)

    def start(self, end: Callable[[], None]) -> None:
        """Begins the work; `end` is called if it fails before there is anything to show."""
        self._end = end
        self._thread.start()

    def close(self) -> None:
        """Is called when the server is told to stop."""
        self.progress.stop()
        if self._explorer is not None:
            self._explorer.state.closing()

    def finish(self, say: Callable[[str], None]) -> None:
        """Waits for the end of the work; raises its error if nothing could be shown."""
        self.progress.stop()
        try:
            self._thread.join(0.5)
            if self._thread.is_alive():
                say(f"ending after this step: {self.progress.name}   (Ctrl-C again: at once)")
                self._thread.join()
        except KeyboardInterrupt:
            end_at_once(EXIT_INTERRUPTED)
        if self._error is not None:
            raise self._error

    @property
    def done(self) -> bool:
        """Whether nothing is being made any more."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def facts(self) -> dict[str, Any]:
        """Returns how far the work is, and how often there was more to show."""
        progress = self.progress
        return {
            "stage": progress.name,
            "share": progress.share,
            "seconds_left": None if progress.seconds_left is None else round(progress.seconds_left),
            "made": self._made,
            "done": self.done,
            "problem": self.problem,
        }

    def answer(self, _request: Request) -> Response:
        """Returns `facts` as JSON."""
        return Json(self.facts())

    def _page(self, request: Request) -> Response:
        if request.url.path.startswith("/api/"):
            return Json({"error": "neurons are still being measured"}, 503, {"retry-after": "5"})
        theme = request.cookies.get("topklm_theme")
        theme = theme if theme in ("light", "dark") else ""
        return HTMLResponse(self._render(theme=theme, work=self), 200, {"cache-control": "no-store"})

    def _run(self) -> None:
        try:
            with contextlib.suppress(StoppedError):
                self._show(self._work(self.progress, self._show))
        except UserError as e:
            if self._explorer is None:
                self._error = e
            else:
                self.problem = str(e)
                self._made += 1
                with contextlib.suppress(StoppedError):
                    self.progress.say(f"{e}; pages are shown without")
        except BaseException as e:  # told in the main thread
            self._error = e
        finally:
            if self._error is not None:
                self._end()

    def _show(self, folder: NeuronsFolder) -> None:
        source = NeuronData(folder)
        reader = None if self._explorer is None else self._explorer.state.reader
        made = app.create(source, self.progress.say, reader=reader, work=self)
        self._current = self._explorer = made
        self._made += 1
