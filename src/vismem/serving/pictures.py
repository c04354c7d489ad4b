"""Images of requests: from a data URI or an allowed web address to a decoded picture, within limits.

Fetching waits on the network and runs on the event loop; `decode` is work for the processor and belongs in a thread.
Which addresses are fetched at all is in `addresses.py`, what of a file is looked at in `stripping.py`, and how that
becomes a picture in `vismem.data.images`.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import anyio
import httpx
from PIL import Image

from vismem import __version__
from vismem.data.images import BadImageError, TooManyPixelsError, open_image, read_data_uri, upright
from vismem.serving.addresses import Address, Place, Resolve, is_public, place_of, read_hosts, read_url, resolve
from vismem.serving.errors import ApiError
from vismem.serving.metadata import stripped

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # whose decoders can be reached from outside; of GIF the first frame
MOST_STRETCHED = 200  # a line of many pixels, made as wide as models want pictures, is many times its size
MOST_HEAD = 256  # characters of a data URI before its data


@dataclass(frozen=True)
class PictureLimits:
    """What images may be, and where they may come from.

    Args:
        count: most images of a request.
        size: most bytes of an image's file.
        total_size: most bytes of all files of a request.
        pixels: most pixels of an image.
        total_pixels: most pixels of all images of a request.
        hosts: that images are fetched from, see `read_hosts`; none refuses every web address.
        timeout: seconds for one fetch, name look-up and redirects included.
        redirects: most of them; each is looked at like the first address.

    Raises:
        ValueError: if a host is not written as hosts are.
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
    """Gets images.

    Args:
        limits: on them.
        find: looks a host's addresses up.
        permitted: which of these may be connected to.
    """

    def __init__(
        self, limits: PictureLimits, *, find: Resolve = resolve, permitted: Callable[[Address], bool] = is_public
    ) -> None:
        self.limits, self.find, self.permitted = limits, find, permitted
        self.hosts = read_hosts(limits.hosts)

    async def fetch(self, urls: Sequence[str]) -> list[bytes]:
        """The files of all images of a request, in order; not decoded.

        Raises:
            ApiError: if there are too many, or one is too large, refused, or cannot be had.
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
        """Pictures of these files, as `vismem.data.images.open_image` makes them. Sizes are checked before decoding.

        Raises:
            ApiError: if one is no whole image of the `FORMATS`, or hardly more than a line, or has too many pixels, or
                all have.
        """
        pictures, left = [], self.limits.total_pixels
        for file in files:
            try:
                plain, orientation = stripped(file)
                picture = open_image(plain, most_pixels=min(self.limits.pixels, left), formats=FORMATS)
            except TooManyPixelsError as error:
                raise self._too_many_pixels() from error
            except BadImageError as error:
                raise _bad(str(error).replace("image in bytes", "it")) from error
            if max(picture.size) > MOST_STRETCHED * min(picture.size):
                raise _bad(f"its longer side is more than {MOST_STRETCHED} times its shorter one")
            left -= picture.width * picture.height
            pictures.append(upright(picture, orientation))
        return pictures

    async def _file(self, url: str, most: int) -> bytes:
        url = url.strip()  # as browsers do
        if url[:5].lower() == "data:":
            return await asyncio.to_thread(self._from_data, url, most)
        try:
            with anyio.fail_after(self.limits.timeout):
                return await self._from_web(read_url(url, self.hosts), most)
        except TimeoutError:
            raise _unavailable(f"it did not come within {self.limits.timeout:g} seconds") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _unavailable(f"its host did not send it ({type(error).__name__})") from None

    def _from_data(self, uri: str, most: int) -> bytes:
        if len(uri) > 4 * (most + MOST_HEAD):  # three bytes are four characters, or up to twelve where percent-encoded
            raise self._too_large()
        try:
            file = read_data_uri(uri)
        except BadImageError as error:
            raise _bad(str(error)) from None
        if len(file) > most:
            raise self._too_large()
        return file

    async def _from_web(self, url: httpx.URL, most: int) -> bytes:
        for _ in range(self.limits.redirects + 1):
            place = await place_of(url, self.find, self.permitted)
            found = await self._get(place, most)
            if isinstance(found, bytes):
                return found
            url = read_url(found, self.hosts)
        raise _unavailable(f"it is more than {self.limits.redirects} redirects away")

    async def _get(self, place: Place, most: int) -> bytes | str:
        """A file, or the address where it is said to be."""
        host = place.url.netloc.decode("ascii")
        request = httpx.Request(
            "GET",
            place.pinned,
            headers={
                "Host": host,
                "User-Agent": f"vismem/{__version__}",
                "Accept": "image/*",
                "Accept-Encoding": "identity",
            },
            extensions={"sni_hostname": place.url.host, "timeout": httpx.Timeout(self.limits.timeout).as_dict()},
        )
        # A transport and no client: no proxies, passwords and cookies, and redirects are followed by nobody but us.
        async with httpx.AsyncHTTPTransport(verify=_tls(), trust_env=False) as transport:
            response = await transport.handle_async_request(request)
            try:
                if response.has_redirect_location:
                    return str(place.url.join(response.headers["location"]))
                if response.status_code != 200:
                    raise _unavailable(f"its host answered {response.status_code}")
                if response.headers.get("content-encoding", "identity").lower() != "identity":
                    raise _unavailable("its host sent it compressed, which was not asked for")
                return await self._read(response, most)
            finally:
                await response.aclose()

    async def _read(self, response: httpx.Response, most: int) -> bytes:
        told = response.headers.get("content-length", "")
        if told.isdecimal() and int(told) > most:
            raise self._too_large()
        file = bytearray()
        async for piece in response.aiter_raw(65536):
            file += piece
            if len(file) > most:
                raise self._too_large()
        return bytes(file)

    def _too_large(self) -> ApiError:
        message = (
            f"an image's file has more than {self.limits.size} bytes, or all have more than {self.limits.total_size}; "
            "make them smaller"
        )
        return ApiError(413, message, code="image_too_large", param="messages")

    def _too_many_pixels(self) -> ApiError:
        message = (
            f"an image has more than {self.limits.pixels} pixels, or all have more than {self.limits.total_pixels}; "
            "make them smaller"
        )
        return ApiError(413, message, code="image_too_large", param="messages")


@functools.cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()


def _bad(why: str) -> ApiError:
    return ApiError(400, f"an image cannot be used: {why}", code="invalid_image", param="messages")


def _unavailable(why: str) -> ApiError:
    return ApiError(400, f"an image could not be fetched: {why}", code="image_unavailable", param="messages")
