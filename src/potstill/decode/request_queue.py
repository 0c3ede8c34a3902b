"""Requests that wait for slots, in the order of arrival; samples of one prompt start together."""

from collections import deque
from collections.abc import Iterator, Sequence

from potstill.decode.request import DecodeRequest


class RequestQueue:
    """Groups of requests, each with one prompt; most groups are one request. Ids count from 0."""

    def __init__(self) -> None:
        self._groups: deque[list[tuple[int, DecodeRequest]]] = deque()
        self._next_id = 0

    def __len__(self) -> int:
        return sum(map(len, self._groups))

    def add(self, requests: Sequence[DecodeRequest]) -> list[int]:
        """Appends a group; returns the ids of its requests."""
        request_ids = list(range(self._next_id, self._next_id + len(requests)))
        self._groups.append(list(zip(request_ids, requests, strict=True)))
        self._next_id += len(requests)
        return request_ids

    def remove(self, request_id: int) -> bool:
        """Removes a request; False if it does not wait."""
        for group in self._groups:
            for entry in group:
                if entry[0] == request_id:
                    group.remove(entry)
                    self._groups = deque(filter(None, self._groups))
                    return True
        return False

    def take_groups(self, num_slots: int) -> Iterator[list[tuple[int, DecodeRequest]]]:
        """Removes and gives the first groups, as many as `num_slots` have room for."""
        while self._groups and len(self._groups[0]) <= num_slots:
            group = self._groups.popleft()
            num_slots -= len(group)
            yield group
