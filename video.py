"""Videos: their frames, copies with other pictures, and objects that stay themselves over time.

frames, problem = redraw("clip.mp4", "copy.mp4", lambda frame: 255 - frame.image)

This is the only module that uses PyAV (the package av, the extra "video").
"""

import collections
import functools
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

import cli
import utils
from boxed_masks import shared_pixels

if TYPE_CHECKING:
    import av

# How names of video files end.
SUFFIXES = frozenset(
    {".avi", ".flv", ".mjpeg", ".mkv", ".ogv", ".webm", ".wmv", ".y4m"}
    | {".3gp", ".m2ts", ".m4v", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts"}
)
# Seconds after which a stream that sends nothing has ended.
TIMEOUT = 10.0
# The share of its duration that a whole video has; what files say of it is not exact.
_COMPLETE = Fraction(95, 100)
_BT709 = 1  # the matrix of colours, as H.264 numbers it


# --- Names ---------------------------------------------------------------------------------------


def is_video(source: str | Path) -> bool:
    """Whether a name is that of a video: a file by its suffix, a URL, or a camera (/dev/video0)."""
    suffix = Path(source).suffix.lower()
    return suffix in SUFFIXES or _is_url(source) or _is_camera(source)


def output_name(source: str | Path) -> str:
    """What to call the files that are made of a video, without a suffix."""
    if _is_url(source):
        url = urlsplit(str(source))
        return Path(url.path).stem or url.hostname or url.scheme
    return Path(source).stem


def check(source: str | Path) -> None:
    """Raises FileNotFoundError where there is no such file, ValueError where PyAV is missing."""
    if not _is_url(source) and not Path(source).exists():
        raise FileNotFoundError(f"no video {source}")
    with cli.extra("video"):
        import av  # noqa: F401


def _is_url(source: str | Path) -> bool:
    return "://" in str(source)


def _is_camera(source: str | Path) -> bool:
    return os.path.exists(source) and stat.S_ISCHR(os.stat(source).st_mode)


# --- Reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """A picture of a video.

    Attributes:
        index: counts from 0.
        pts: when to show it, in units of time_base from the start of the video.
        time_base: seconds.
        decoded: as PyAV has it.
    """

    index: int
    pts: int
    time_base: Fraction
    decoded: "av.VideoFrame"

    @property
    def time(self) -> float:
        """Seconds from the start of the video."""
        return float(self.pts * self.time_base)

    @functools.cached_property
    def image(self) -> np.ndarray:
        """[H, W, 3] uint8 RGB, upright."""
        return np.ascontiguousarray(_upright(self.decoded, self.decoded.to_ndarray(format="rgb24")))

    @property
    def grey(self) -> np.ndarray:
        """[H, W, 1] uint8, upright."""
        return np.asarray(Image.fromarray(self.image).convert("L"))[:, :, None]


class Video:
    """A video file, URL or camera, open for reading; iterating gives each Frame.

    with Video("clip.mp4") as clip:
        for frame in clip:
            print(frame.time, frame.image.shape)

    Packets that cannot be decoded are left out. What was missed so is in `problem` at the end.

    Attributes:
        frame_count: about how many frames there are; None if nobody knows, as of a stream.
        problem: None, or why not all frames could be read.

    Raises:
        ValueError: PyAV is missing, or there is no video that can be read.
    """

    def __init__(self, source: str | Path) -> None:
        with cli.extra("video"):
            import av
        self.source = source
        self.problem: str | None = None
        timeout = TIMEOUT if _is_url(source) else None
        try:
            self._container = av.open(
                str(source), format="v4l2" if _is_camera(source) else None, timeout=timeout
            )
        except av.FFmpegError as error:
            raise ValueError(f"{source} cannot be read as a video: {error.strerror}") from None
        video = self._container.streams.best("video")
        if video is None or not isinstance(video, av.VideoStream):
            self.close()
            raise ValueError(f"{source} holds no pictures")
        self.stream = video
        self.audio = self._container.streams.best("audio")
        self._audio_packets: list[av.Packet] = []

        assert video.time_base is not None
        self.time_base = video.time_base
        self.rate = Fraction(video.average_rate or video.guessed_rate or 25)
        self._step = max(1, round(1 / (self.rate * self.time_base)))
        self.start = Fraction(0)  # of the first frame, which is at 0 for those who use it
        duration = self._duration()
        self.frame_count = video.frames or round((duration or 0) * self.rate) or None

    def _duration(self) -> Fraction | None:
        """Seconds, as the file says."""
        if self.stream.duration:
            seconds = self.stream.duration * self.time_base
        elif self._container.duration:
            seconds = Fraction(self._container.duration, 1_000_000)
        else:
            return None
        if "mp4" not in self._container.format.name:  # where frames may be cut from what is shown
            seconds = max(seconds, self.stream.frames / self.rate)
        return seconds

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._container.close()

    def take_audio(self) -> "list[av.Packet]":
        """The packets of sound that were read since the last call."""
        packets, self._audio_packets = self._audio_packets, []
        return packets

    def __iter__(self) -> Iterator[Frame]:
        """Raises ValueError if there is no frame at all."""
        index, last, shift = -1, -self._step, 0
        for index, decoded in enumerate(self._decoded()):
            pts = last + self._step - shift if decoded.pts is None else decoded.pts
            # Cameras and broadcasts begin anywhere; where streams were joined, times jump back.
            if index == 0 or pts + shift <= last:
                shift = last + self._step - pts
            if index == 0:
                self.start = pts * self.time_base
            last = pts + shift
            yield Frame(index, last, self.time_base, decoded)
        if index < 0:
            raise ValueError(f"{self.source} has no frame that can be read")

    def _decoded(self) -> "Iterator[av.VideoFrame]":
        import av

        packets = self._container.demux([s for s in (self.stream, self.audio) if s is not None])
        packet: av.Packet | None
        damaged, end, ending, error_text = 0, Fraction(0), False, ""
        while not ending:
            try:
                packet = next(packets)
            except (StopIteration, av.FFmpegError) as error:
                packet, ending = None, True  # which asks the decoder for what it has left
                if isinstance(error, av.ExitError):
                    error_text = f": nothing came for {TIMEOUT:g} s"
                elif isinstance(error, av.FFmpegError):
                    error_text = f": {error.strerror}"
            if packet is not None:
                if packet.pts is not None and packet.time_base is not None:
                    end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
                if packet.stream is not self.stream:
                    self._audio_packets.append(packet)
                    continue
            try:
                frames = self.stream.decode(packet)
                damaged += packet is not None and packet.is_corrupt
            except av.FFmpegError as error:
                frames = []
                damaged += not isinstance(error, av.EOFError)  # where it had nothing left
            yield from frames
        duration = self._duration()
        if error_text or (duration is not None and end + 1 / self.rate < _COMPLETE * duration):
            of = f" of {float(duration):.1f}" if duration is not None else ""
            self.problem = f"it breaks off after {float(end - self.start):.1f}{of} s{error_text}"
        elif damaged:
            self.problem = f"packets are damaged: {damaged}"


def _upright(decoded: "av.VideoFrame", pixels: np.ndarray) -> np.ndarray:
    """Pixels [H, W, C] turned as the display matrix of their frame says, by quarters."""
    (a, b), (c, d) = _display_matrix(decoded)
    if abs(b) > abs(a):
        pixels, across, down = pixels.swapaxes(0, 1), c, b
    else:
        across, down = a, d
    return pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


def _display_matrix(decoded: "av.VideoFrame") -> list[list[int]]:
    """[[a, b], [c, d]]: right, and down, of the stored pixels in what is shown."""
    data: Any = decoded.side_data.get("DISPLAYMATRIX")
    if data is None:
        return [[1, 0], [0, 1]]
    return np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2].tolist()


# --- Writing -------------------------------------------------------------------------------------


def redraw(
    source: str | Path, target: str | Path | None, draw: Callable[[Frame], np.ndarray | None]
) -> tuple[int, str | None]:
    """Reads a video and writes a copy with other pictures; shows its progress.

    The copy is H.264 in MP4, upright, has the times of the frames and, where MP4 can hold it, the
    sound. It is written whole or not at all, and after Ctrl-C with what was done until then.

    Args:
        source: a file, a URL or a camera.
        target: the file to write; None writes none.
        draw: called with each frame; what it returns, [H, W, 3] uint8 RGB, is its picture in the
            copy. The first one sets the size, to which others are scaled.

    Returns:
        How many frames were read, and why there were no more; None if those are all.

    Raises:
        ValueError: PyAV is missing, the video has no frame that can be read, or the copy cannot be
            written.
    """
    count = 0
    with Video(source) as clip, utils.progress(total=clip.frame_count, unit=" frames") as bar:

        def pictures() -> Iterator[tuple[Frame, Any]]:
            nonlocal count
            for frame in clip:
                yield frame, draw(frame)
                count += 1
                bar.update()

        if target is None:
            collections.deque(pictures(), maxlen=0)
            return count, clip.problem
        interrupted = False

        def write(file: BinaryIO) -> None:
            nonlocal interrupted
            interrupted = _Writer(clip, file).write(pictures())

        utils.write_atomic(target, write)
        if interrupted:
            raise KeyboardInterrupt(f"{target} holds the first {count} frames")
    return count, clip.problem


class _Writer:
    """Encodes pictures as H.264 in MP4, with the sound of the video that they were made of."""

    def __init__(self, clip: Video, file: BinaryIO) -> None:
        self.clip, self.file = clip, file
        self.last_dts: int | None = None

    def write(self, pictures: Iterator[tuple[Frame, np.ndarray]]) -> bool:
        """Writes all of them; returns whether Ctrl-C ended it before."""
        import av

        interrupted = False
        try:
            with av.open(self.file, "w", format="mp4") as self.container:
                first = next(pictures)
                self._add_streams(*first)
                try:
                    self._encode_all(first, pictures)
                except KeyboardInterrupt:
                    interrupted = True
                self._put_audio(self.clip.take_audio())
                self.container.mux(self.video.encode(None))
        except av.FFmpegError as error:
            raise ValueError(f"the copy cannot be written: {error.strerror}") from error
        return interrupted

    def _encode_all(
        self, first: tuple[Frame, np.ndarray], rest: Iterator[tuple[Frame, np.ndarray]]
    ) -> None:
        # In a thread of its own, encoding takes no time from the network, and is not cut off by
        # Ctrl-C, which would lose a packet that those after it need.
        with ThreadPoolExecutor(1) as pool:
            job: Future[None] = pool.submit(self._put, *first, self.clip.take_audio())
            for frame, picture in rest:
                job.result()
                job = pool.submit(self._put, frame, picture, self.clip.take_audio())
            job.result()

    def _add_streams(self, frame: Frame, picture: np.ndarray) -> None:
        source = self.clip.stream.codec_context
        self.height, self.width = picture.shape[:2]
        video = self.container.add_stream("libx264", rate=self.clip.rate)
        video.width, video.height = self.width, self.height
        # Pairs of pixels share a colour, so that there must be an even number of them.
        video.pix_fmt = "yuv444p" if self.width % 2 or self.height % 2 else "yuv420p"
        video.options = {"preset": "veryfast", "crf": "20"}
        context = video.codec_context
        context.time_base = frame.time_base
        ratio = source.sample_aspect_ratio
        if ratio:
            (a, b), _ = _display_matrix(frame.decoded)
            context.sample_aspect_ratio = 1 / ratio if abs(b) > abs(a) else ratio
        context.colorspace, context.color_range = _BT709, 1
        context.color_primaries, context.color_trc = source.color_primaries, source.color_trc
        self.video, self.audio = video, None
        audio = self.clip.audio
        if audio is not None and audio.codec_context.name in self.container.supported_codecs:
            self.audio = self.container.add_stream_from_template(audio)

    def _put(self, frame: Frame, picture: np.ndarray, audio: "list[av.Packet]") -> None:
        import av

        self._put_audio(audio)
        encoded = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        encoded = encoded.reformat(
            self.width, self.height, self.video.pix_fmt, dst_colorspace="ITU709"
        )
        encoded.pts, encoded.time_base = frame.pts, frame.time_base
        self.container.mux(self.video.encode(encoded))

    def _put_audio(self, packets: "list[av.Packet]") -> None:
        for packet in packets:
            if self.audio is None or packet.dts is None or packet.pts is None:
                continue
            shift = round(self.clip.start / packet.time_base)
            packet.dts, packet.pts = packet.dts - shift, packet.pts - shift
            if self.last_dts is None or packet.dts > self.last_dts:  # as MP4 needs it
                self.last_dts = packet.dts
                packet.stream = self.audio
                self.container.mux(packet)


# --- Objects over time ---------------------------------------------------------------------------


@dataclass
class _Track:
    """An object: the part of its mask in its box (y1, x1, y2, x2) where it was last seen."""

    number: int
    class_id: int
    box: np.ndarray
    part: np.ndarray
    velocity: np.ndarray  # [2] down and across, pixels per frame
    missed: int = 0

    def expected(self) -> np.ndarray:
        """Its box in the next frame, if it moves on as it did."""
        return self.box + np.tile(self.velocity * (self.missed + 1), 2).round().astype(int)

    def see(self, box: np.ndarray, part: np.ndarray) -> None:
        edges = (box - self.box).reshape(2, 2) / (self.missed + 1)
        # Of two opposite edges, that which something hides moves as it should not.
        odd = np.abs(edges - self.velocity).argmin(axis=0)
        self.velocity = (self.velocity + edges[odd, [0, 1]]) / 2
        self.box, self.part, self.missed = box, part, 0


class Tracker:
    """Gives each object of a video a number that it keeps from frame to frame.

    An object is the one before of its class whose mask, moved on as it moved until then, it covers
    best; pairs are chosen such that the sum of their IoU is largest.

    Args:
        least_iou: of two masks, below which they are not of one object.
        patience: how many frames in a row an object may be missed.
    """

    def __init__(self, least_iou: float = 0.2, patience: int = 10) -> None:
        self.least_iou, self.patience = least_iou, patience
        self.count = 0  # of the objects so far
        self._tracks: list[_Track] = []

    def update(self, result: dict[str, Any]) -> list[int]:
        """The numbers [N], from 1, of the objects of the next frame.

        Args:
            result: of MaskRCNN.detect(..., masks="rle").
        """
        from scipy.optimize import linear_sum_assignment  # takes half a second, of every command

        class_ids, parts = result["class_ids"].tolist(), map(utils.rle_decode_part, result["masks"])
        found = [(np.array(box), part) for box, part in parts]
        overlaps = np.zeros((len(found), len(self._tracks)))
        for j, track in enumerate(self._tracks):
            box = track.expected()
            for i, (class_id, other) in enumerate(zip(class_ids, found, strict=True)):
                if class_id == track.class_id:
                    overlaps[i, j] = _mask_iou(*other, box, track.part)
        overlaps[overlaps < self.least_iou] = 0
        pairs = zip(*linear_sum_assignment(overlaps, maximize=True), strict=True)
        known = {i: self._tracks[j] for i, j in pairs if overlaps[i, j] > 0}
        for i, (class_id, (box, part)) in enumerate(zip(class_ids, found, strict=True)):
            if i in known:
                known[i].see(box, part)
                continue
            self.count += 1
            known[i] = _Track(self.count, class_id, box, part, np.zeros(2))
        seen = [known[i] for i in range(len(found))]
        numbers = [track.number for track in seen]
        missed = [track for track in self._tracks if track.number not in numbers]
        for track in missed:
            track.missed += 1
        self._tracks = seen + [track for track in missed if track.missed <= self.patience]
        return numbers


def _mask_iou(box1: np.ndarray, part1: np.ndarray, box2: np.ndarray, part2: np.ndarray) -> float:
    """IoU of two masks, each the part [h, w] in a box (y1, x1, y2, x2)."""
    intersection = shared_pixels((tuple(box1), part1), (tuple(box2), part2))
    if not intersection:
        return 0.0
    return intersection / (np.count_nonzero(part1) + np.count_nonzero(part2) - intersection)
