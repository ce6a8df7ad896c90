"""TensorBoard events of a run; imported by the one process that writes them.

(tensorboardX imports torch where that is installed, which takes seconds.)
"""

import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


class Events:
    """Appends a file of events to a folder, made with the first of them.

    Without tensorboardX's SummaryWriter: its thread dies, with a traceback, of a full disk.
    """

    def __init__(self, folder: Path, first_step: int):
        """TensorBoard will hide what older files have from `first_step` on."""
        self._folder, self._first_step = folder, first_step
        self._writer: EventsWriter | None = None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends an event, and hands it to the operating system: a kill does not lose it.

        Raises:
          OSError: the disk does not take it.
        """
        if not self._writer:
            self._folder.mkdir(parents=True, exist_ok=True)
            # File names have the time in seconds only; a restart must not overwrite.
            self._writer = EventsWriter(str(self._folder / "events"), f".{self._first_step}")
            start = SessionLog(status=SessionLog.START)
            self._write(self._first_step, session_log=start)
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step, summary=Summary(value=scalars))
        self._writer.flush()

    def close(self) -> None:
        """Raises an OSError as `write` does."""
        if self._writer:
            self._writer.close()

    def _write(self, step: int, **content: Summary | SessionLog) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))
