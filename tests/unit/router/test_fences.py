"""What a decode worker hears once the pod of a prefill worker has ended, and when it hears nothing."""

import pytest

from disagg.kubernetes import PodEnd
from disagg.protocol import Fenced, Prefill
from support.router import Actor, Harness

ADDRESS = "tcp://10.0.0.7:5600"
ENDED = PodEnd("chat-prefill-x", frozenset({"10.0.0.7"}))


class Scene:
    """A prefill worker in a pod, by default on another machine, which owes a fence to a decode worker."""

    def __init__(self, router: Harness, *, is_here: bool = False, **welcome: str) -> None:
        self.router = router
        if not is_here:
            router.unproven.add(ADDRESS)
        self.prefill = router.add("prefill", ADDRESS, worker_id="chat-prefill-x", **welcome)
        self.decode: Actor = router.add("decode")
        router.submit()
        self.decode.reserve()
        self.fenced = Fenced(self.prefill.take(Prefill).transfer_id, 0)

    def is_told(self) -> bool:
        self.router.advance(0.1)
        return self.fenced in self.decode.sent()


@pytest.fixture
def scene(router: Harness) -> Scene:
    return Scene(router)


def test_the_end_of_its_pod_is_the_fence(scene: Scene) -> None:
    scene.prefill.die()
    assert not scene.is_told()
    scene.router.pods.add([ENDED])
    assert scene.is_told()
    assert not scene.is_told(), "once"


def test_an_end_that_is_told_before_the_link_breaks_counts(scene: Scene) -> None:
    """ZeroMQ finds a dead machine out by silence, after the API server has told of it."""
    scene.router.pods.add([ENDED])
    assert not scene.is_told(), "as long as it answers there is nothing to prove"
    scene.prefill.die()
    assert scene.is_told()


def test_a_worker_that_is_in_no_slice_any_more_is_proven_gone_all_the_same(scene: Scene) -> None:
    scene.prefill.die()
    worker = scene.router.dispatcher.registry.get(ADDRESS)
    assert worker is not None
    worker.standing = "gone"
    assert not scene.is_told()
    assert scene.router.dispatcher.registry.get(ADDRESS) is None
    scene.router.pods.add([ENDED])
    assert scene.is_told()


@pytest.mark.parametrize(
    "ended", [PodEnd("chat-prefill-x", frozenset({"10.0.0.8"})), PodEnd("chat-prefill-y", ENDED.ips)]
)
def test_the_end_of_another_pod_proves_nothing(scene: Scene, ended: PodEnd) -> None:
    scene.prefill.die()
    scene.router.pods.add([ended])
    assert not scene.is_told()


def test_a_successor_at_the_same_address_leaves_the_proof_to_come(scene: Scene) -> None:
    """The first one may be on a node that nobody reaches; its pod's end is told when that is known."""
    scene.prefill.die()
    scene.prefill.restart()
    assert not scene.is_told()
    scene.router.pods.add([ENDED])
    assert scene.is_told()


def test_a_successor_in_the_same_pod_is_the_fence(router: Harness) -> None:
    """A kubelet starts a container anew only once the one before has ended."""
    scene = Scene(router, pod_uid="uid-of-x")
    scene.prefill.die()
    assert not scene.is_told()
    scene.prefill.restart()
    assert scene.is_told()
    assert not scene.is_told(), "once"


@pytest.mark.parametrize("pod_uid", ["", "uid-of-y"])
def test_a_successor_in_another_pod_or_in_none_proves_nothing(router: Harness, pod_uid: str) -> None:
    scene = Scene(router, pod_uid="uid-of-x" if pod_uid else "")
    scene.prefill.die()
    scene.prefill.restart(pod_uid=pod_uid)
    assert not scene.is_told()


def test_a_fence_is_told_when_the_link_to_decode_is_back(scene: Scene) -> None:
    """A node that is lost takes others' links with it for a while; nothing else would tell it later."""
    scene.prefill.die()
    scene.decode.die()
    scene.router.pods.add([ENDED])
    scene.router.advance(0.1)
    scene.decode.join()
    assert scene.is_told()
    scene.decode.die()
    scene.decode.join()
    assert not scene.is_told(), "once"


@pytest.mark.parametrize("is_pod", [True, False])
def test_whichever_proof_comes_first_counts(router: Harness, is_pod: bool) -> None:
    scene = Scene(router, is_here=True)
    scene.prefill.die()
    assert not scene.is_told()
    if is_pod:
        router.pods.add([ENDED])
    else:
        scene.prefill.proof.gone = True
    assert scene.is_told()
