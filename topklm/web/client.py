"""What a server learns of a client while it is busy with its answer."""

from starlette.types import Receive


async def gone(receive: Receive) -> None:
    """Returns once a client has hung up; what it still sends is read past.

    Args:
        receive: Of its connection, when its request has been read.
    """
    while (await receive())["type"] != "http.disconnect":
        pass
