"""TensorBoard scalars that agree with the checkpoints: every event file ends where a checkpoint does."""

from collections.abc import Sequence
from pathlib import Path

from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from experiments import writing

__all__ = ["drop_events", "write_events"]

Row = tuple[int, float, dict[str, Sequence[float]]]
"""Step, seconds since the epoch, and for each name one value per member."""


def write_events(folder: Path, members: Sequence[str], rows: Sequence[Row]) -> None:
    """Write `rows` to `folder/MEMBER/events.out.tfevents.STEP`, one new file per member, named by the last step.

    To be called just before the checkpoint of that step: scalars that a resumed run computes again were then never on
    disk, or are in files that `drop_events` deletes, and a reader has nothing to purge.
    """
    last_step, _, _ = rows[-1]
    for index, member in enumerate(members):
        path = folder / member / f"events.out.tfevents.{last_step:09d}"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            writer = RecordWriter(str(path))
            writer.write(Event(wall_time=rows[0][1], file_version="brain.Event:2").SerializeToString())
            for step, wall_time, values in rows:
                for name, value in values.items():
                    summary = Summary(value=[Summary.Value(tag=name, simple_value=value[index])])
                    writer.write(Event(wall_time=wall_time, step=step, summary=summary).SerializeToString())
            writer.close()


def drop_events(folder: Path, step: int) -> None:
    """Delete the event files that go past `step`, from which a run resumes."""
    for path in folder.glob("*/events.out.tfevents.*"):
        if int(path.suffix[1:]) > step:
            path.unlink()
