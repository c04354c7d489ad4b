"""Images of requests: fetches data URIs and allowed web addresses, and decodes them, within limits.

`fetch` waits for the network and runs on the event loop; `decode` keeps the CPU busy and belongs in a thread.
`addresses.py` decides which addresses may be fetched, `metadata.py` strips a file to its pixels, and
`vismem.data.images` decodes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import anyio
import httpx
from PIL import Image

from vismem import __version__
from vismem.data.images import BadImageError, TooManyPixelsError, open_image, read_data_uri, upright
from vismem.serving.addresses import PublicTransport, read_hosts, read_url
from vismem.serving.errors import ApiError
from vismem.serving.metadata import stripped

HEADERS = {"User-Agent": f"vismem/{__version__}", "Accept": "image/*", "Accept-Encoding": "identity"}
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # whose decoders clients can reach; of a GIF only the first frame
MAX_ASPECT_RATIO = 200  # a one-pixel line resized to a model's minimum width becomes huge
MAX_URI_PREFIX = 256  # characters of a data URI before its data


@dataclass(frozen=True)
class PictureLimits:
    """Limits on images, and the hosts they may be fetched from.

    Args:
        count: images per request.
        size: bytes per file.
        total_size: bytes of all files of a request.
        pixels: pixels per image.
        total_pixels: pixels of all images of a request.
        hosts: hosts that images may be fetched from, see `read_hosts`; if empty, web addresses are refused.
        timeout: seconds per fetch, including name resolution and redirects.
        redirects: per fetch; each target is checked like the first address.

    Raises:
        ValueError: if a host is malformed.
    """

    count: int = 8
    size: int = 20 * 2**20
    total_size: int = 64 * 2**20
    pixels: int = 36_000_000
    total_pixels: int = 72_000_000
    hosts: tuple[str, ...] = ()
    timeout: float = 10.0
    redirects: int = 3

    def __post_init__(self) -> None:
        read_hosts(self.hosts)


class Pictures:
    """Fetches and decodes images.

    Args:
        limits: the limits.
    """

    def __init__(self, limits: PictureLimits) -> None:
        self.limits, self.hosts = limits, read_hosts(limits.hosts)

    async def fetch(self, urls: Sequence[str]) -> list[bytes]:
        """The undecoded files of a request's images, in order.

        Raises:
            ApiError: if there are too many, or one is too large, not allowed or not available.
        """
        if len(urls) > self.limits.count:
            raise ApiError(
                413,
                f"{len(urls)} images; this server takes at most {self.limits.count}",
                code="too_many_images",
                param="messages",
            )
        files, left = [], self.limits.total_size
        for url in urls:
            files.append(await self._file(url, min(self.limits.size, left)))
            left -= len(files[-1])
        return files

    def decode(self, files: Sequence[bytes]) -> list[Image.Image]:
        """Decodes files with `vismem.data.images.open_image`. Sizes are checked before decoding.

        Raises:
            ApiError: if a file is not a complete image in one of the `FORMATS`, is extremely narrow, or there are too
                many pixels.
        """
        pictures, left = [], self.limits.total_pixels
        for file in files:
            try:
                plain, orientation = stripped(file)
                picture = open_image(plain, most_pixels=min(self.limits.pixels, left), formats=FORMATS)
            except TooManyPixelsError as error:
                raise _over_limit("pixels", self.limits.pixels, self.limits.total_pixels) from error
            except BadImageError as error:
                raise _bad(str(error).replace("image in bytes", "it")) from error
            if max(picture.size) > MAX_ASPECT_RATIO * min(picture.size):
                raise _bad(f"its longer side is more than {MAX_ASPECT_RATIO} times its shorter one")
            left -= picture.width * picture.height
            pictures.append(upright(picture, orientation))
        return pictures

    async def _file(self, url: str, max_size: int) -> bytes:
        url = url.strip()  # as browsers do
        if url[:5].lower() == "data:":
            return await asyncio.to_thread(self._from_data, url, max_size)
        try:
            with anyio.fail_after(self.limits.timeout):
                return await self._from_web(read_url(url, self.hosts), max_size)
        except TimeoutError:
            raise _unavailable(f"it did not arrive within {self.limits.timeout:g} seconds") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _unavailable(f"its host did not send it ({type(error).__name__})") from None

    def _from_data(self, uri: str, max_size: int) -> bytes:
        if len(uri) > 4 * (max_size + MAX_URI_PREFIX):  # base64: 4 characters for 3 bytes, or 12 percent-encoded
            raise self._too_large()
        try:
            file = read_data_uri(uri)
        except BadImageError as error:
            raise _bad(str(error)) from None
        if len(file) > max_size:
            raise self._too_large()
        return file

    async def _from_web(self, url: httpx.URL, max_size: int) -> bytes:
        transport = PublicTransport(self.hosts)
        async with httpx.AsyncClient(transport=transport, headers=HEADERS, timeout=self.limits.timeout) as client:
            request = client.build_request("GET", url)
            for _ in range(self.limits.redirects + 1):
                response = await client.send(request, auth=None, stream=True)
                try:
                    if response.next_request is None:
                        return await self._read(response, max_size)
                    request = response.next_request  # httpx would read the whole body before following it
                finally:
                    await response.aclose()
        raise _unavailable(f"it is more than {self.limits.redirects} redirects away")

    async def _read(self, response: httpx.Response, max_size: int) -> bytes:
        if response.status_code != 200:
            raise _unavailable(f"its host answered {response.status_code}")
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise _unavailable("its host sent it compressed, although uncompressed data was requested")
        announced = response.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > max_size:
            raise self._too_large()
        file = bytearray()
        async for piece in response.aiter_raw(65536):
            file += piece
            if len(file) > max_size:
                raise self._too_large()
        return bytes(file)

    def _too_large(self) -> ApiError:
        return _over_limit("bytes", self.limits.size, self.limits.total_size)


def _over_limit(unit: str, most: int, total: int) -> ApiError:
    message = f"an image has more than {most} {unit}, or all have more than {total}; make them smaller"
    return ApiError(413, message, code="image_too_large", param="messages")


def _bad(why: str) -> ApiError:
    return ApiError(400, f"an image cannot be used: {why}", code="invalid_image", param="messages")


def _unavailable(why: str) -> ApiError:
    return ApiError(400, f"an image could not be fetched: {why}", code="image_unavailable", param="messages")
