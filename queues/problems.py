"""What is wrong with what an actor says of a group or a trajectory: (reason, detail), or None if it can be taken."""

from collections.abc import Mapping

from queues.trajectories import Group, Trajectory
from stream_rl import messages as m
from stream_rl.types import Int32Array, Status

MAX_MEMBERS = 4096
"""Of a group, branches included."""
MAX_TASK = 1024
MAX_TOKENS = 1 << 22
"""Of one trajectory, whoever brought them."""

Problem = tuple[str, str] | None
OfTrajectory = m.OpenBranch | m.AppendTokens | m.CloseTrajectory | m.Interrupted


def of_group(event: m.OpenGroup) -> Problem:
    if not 1 <= event.members <= MAX_MEMBERS:
        return "bad_members", f"a group has 1 to {MAX_MEMBERS} members, got {event.members}"
    if len(event.task) > MAX_TASK:
        return "bad_task", f"a task's name has {MAX_TASK} characters at most, got {len(event.task)}"
    return _of_tokens(event.prompt_ids, 0, "bad_prompt")


def of_trajectory(event: OfTrajectory, actor: str, groups: Mapping[int, Group]) -> Problem:
    group = groups.get(event.group)
    if group is None or group.actor != actor:
        return _of_owner(event.group, group)
    if isinstance(event, m.OpenBranch):
        return _of_branch(event, group)
    if not 0 <= event.member < len(group.members):
        return "unknown_member", f"group {event.group} has {len(group.members)} members, got {event.member}"
    trajectory, closes = group.members[event.member], isinstance(event, m.CloseTrajectory)
    if trajectory.closed:
        return "already_closed", f"trajectory {trajectory.label} was closed before"
    if trajectory.segment != event.segment and not (closes and trajectory.untouched_since(event.segment)):
        detail = f"trajectory {trajectory.label} is at segment {trajectory.segment}, this is of {event.segment}"
        return ("old_segment" if event.segment < trajectory.segment else "unknown_segment"), detail
    if isinstance(event, m.CloseTrajectory):
        if event.status not in set(Status):
            return "bad_status", f"a status is one of {[s.value for s in Status]}, got {event.status!r}"
    elif trajectory.appending:
        return "already_appended", f"segment {event.segment} of trajectory {trajectory.label} was said to be over"
    elif isinstance(event, m.AppendTokens):
        return _of_append(event, trajectory)
    return None


def _of_branch(event: m.OpenBranch, group: Group) -> Problem:
    members = group.members
    if event.member != len(members):
        return "unknown_member", f"the next branch of group {group.id} is {len(members)}, got {event.member}"
    if len(members) >= MAX_MEMBERS:
        return "bad_members", f"group {group.id} has {MAX_MEMBERS} trajectories"
    if not 0 <= event.episode < len(members) or members[event.episode].episode != event.episode:
        return "unknown_episode", f"no episode of group {group.id} began as {event.episode}"
    return _of_tokens(event.prompt_ids, 1, "bad_prompt")


def _of_append(event: m.AppendTokens, trajectory: Trajectory) -> Problem:
    if trajectory.interrupted and not trajectory.resting:
        return "interrupted", f"segment {event.segment} of trajectory {trajectory.label} was said to be interrupted"
    if problem := _of_tokens(event.token_ids, 1, "bad_tokens"):
        return problem
    if trajectory.num_tokens + event.token_ids.size > MAX_TOKENS:
        return "too_long", f"trajectory {trajectory.label} would have more than {MAX_TOKENS} tokens"
    return None


def _of_owner(number: int, group: Group | None) -> Problem:
    if group is None:
        return "unknown_group", f"no group {number} is open"
    return "not_its_actor", f"group {number} is of {group.actor}"


def _of_tokens(ids: Int32Array, least: int, reason: str) -> Problem:
    if ids.ndim != 1 or not least <= ids.size <= MAX_TOKENS or (ids.size and int(ids.min()) < 0):
        return reason, f"expected a row of {least} to {MAX_TOKENS} token ids, got {ids.size} of shape {ids.shape}"
    return None
