"""The scripts and the stylesheet of the pages: a few files, held in memory, that browsers ask for once.

Their addresses hold a digest of all of them, so a browser may keep them for ever.
"""

import hashlib
import importlib.resources

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

# Not as the machine has it set: browsers run scripts of this kind only.
_KINDS = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_FOR_EVER = "public, max-age=31536000, immutable"


class StaticFiles:
    """Answers requests for the package's static files, and for no others."""

    def __init__(self) -> None:
        folder = importlib.resources.files("topklm.explorer").joinpath("static")
        self._files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        digest = hashlib.sha256()
        for name, content in sorted(self._files.items()):
            digest.update(name.encode() + content)
        self.version = digest.hexdigest()[:12]

    async def answer(self, request: Request) -> Response:
        """The file that is named."""
        name = request.path_params["name"]
        if name not in self._files or request.path_params["version"] != self.version:
            raise HTTPException(404)
        kind = _KINDS[name.rpartition(".")[2]]
        return Response(self._files[name], media_type=kind, headers={"cache-control": _FOR_EVER})
