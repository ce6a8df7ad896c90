"""TensorBoard events of a run; imported by the one process that writes them.

(tensorboardX imports torch where that is installed, which takes seconds.)
"""

import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

# Others read the metrics as they come; TensorBoard's events reach the disk this often.
_EVERY_SECONDS = 30


class Events:
    """Appends a file of events to a folder.

    Without tensorboardX's SummaryWriter: its thread dies, with a traceback, of a full disk.
    """

    def __init__(self, folder: Path, first_step: int):
        """Makes the file; TensorBoard hides what older files have from `first_step` on.

        Raises:
          OSError: it cannot be written; of the other methods, too.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # File names have the time in seconds only; a restart must not overwrite.
        self._writer = EventsWriter(str(folder / "events"), f".{first_step}")
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=first_step, session_log=start))
        self._flushed = time.monotonic()

    def write(self, step: int, values: dict[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.write_event(
            Event(wall_time=time.time(), step=step, summary=Summary(value=scalars))
        )
        if time.monotonic() > self._flushed + _EVERY_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()
