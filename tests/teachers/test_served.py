"""A served teacher answers as the local one, by both dialects; what would teach wrongly is refused."""

import json
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from tests.serving import Server
from tests.tiny import byte_tokenizer, random_llama
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.errors import MissingDependency, ServerError, UnsupportedModel, UsageError, VocabularyMismatch
from potstill.core.types import IGNORE, Needs, supervised_positions
from potstill.data.packing import collate, pack
from potstill.data.token_dataset import TokenizedDocument
from potstill.models.load import LoadedModel
from potstill.models.signals import compute_signals
from potstill.objectives.config import ObjectiveConfig
from potstill.ops.coarse import coarsen
from potstill.serve.app import create_app
from potstill.serve.server import listen, open_socket
from potstill.teachers import http_client, served
from potstill.teachers.http_client import Address
from potstill.teachers.logprob_formats import EchoLogprobs
from potstill.teachers.served import NEXT_TOKEN_LOG_P, ServedTeacher
from potstill.train.training_module import TrainingModule

TEXTS = ("the still boils a wash", "a wash", "its spirit runs over into cold worms", "and", "worms")
Change = Callable[[dict[str, Any], int], Any]


@pytest.fixture
def batch(tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """Five documents in a row; of the third, half is only read, and of the fourth nothing is trained on."""
    rows = [list(tiny_tokenizer(text).input_ids) for text in TEXTS]
    labels = [rows[0], rows[1], [IGNORE] * 18 + rows[2][18:], [IGNORE] * 3, rows[4]]
    packs = [
        {"input_ids": torch.tensor(r), "labels": torch.tensor([IGNORE, *said[1:]]), "lengths": torch.tensor([len(r)])}
        for r, said in zip(rows, labels, strict=True)
    ]
    return collate(packs)


@pytest.fixture(params=["prompt_logprobs", "echo with logprobs"])
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow one another at once."""
    monkeypatch.setattr(http_client, "FIRST_WAIT", 0.001)


@pytest.fixture
def letters(tmp_path: Path) -> Iterator[str]:
    """The address of a server whose tokens are the letters of ASCII, so that each has a string of its own."""
    tokenizer = byte_tokenizer(ascii=True)
    loaded = LoadedModel(random_llama(tokenizer), tokenizer, "letters", tmp_path, None, "")
    with open_socket("127.0.0.1", 0) as listener:
        url = listen(listener, "127.0.0.1")
        one = uvicorn.Server(uvicorn.Config(create_app(loaded, name="letters"), log_level="error"))
        thread = threading.Thread(target=one.run, kwargs={"sockets": [listener]})
        thread.start()
        yield url
        one.should_exit = True
        thread.join()


@contextmanager
def asked(url: str, **options: Any) -> Iterator[ServedTeacher]:
    teacher = ServedTeacher(url, options.pop("tokenizer", None) or byte_tokenizer(), **options)
    try:
        yield teacher
    finally:
        teacher.close()


@contextmanager
def between(real: str, change: Change) -> Iterator[str]:
    """A real server before the `real` server: `change(body, n)` of the n-th request for completions.

    It says what goes on to the real one (a dictionary), or what is answered (a status and a body), or that the
    connection is cut (None).
    """
    counter, lock = iter(range(10**6)), threading.Lock()

    class Before(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._pass_on(None)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                changed = change({**body, "headers": dict(self.headers)}, next(counter))
            if changed is None:
                self.close_connection = True
            elif isinstance(changed, dict):
                changed.pop("headers", None)
                self._pass_on(json.dumps(changed).encode())
            else:
                self._answer(*changed)

        def _pass_on(self, data: bytes | None) -> None:
            at = real.removesuffix("/v1") + self.path
            with urllib.request.urlopen(
                urllib.request.Request(at, data, {"content-type": "application/json"})
            ) as found:
                self._answer(found.status, json.load(found))

        def _answer(self, status: int, body: Any) -> None:
            said = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Before) as one:
        thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{one.server_address[1]}/v1"
        finally:
            one.shutdown()
            thread.join()


def needs(batch: dict[str, Tensor]) -> Needs:
    return Needs(supervised_positions(batch)[0])


@pytest.mark.parametrize("k", [1, 8, 259])
def test_a_served_teacher_says_what_the_local_one_says(
    k: int, server: Server, batch: dict[str, Tensor], tiny_llama: LlamaForCausalLM
) -> None:
    with asked(server.url, top_k=k) as teacher, torch.no_grad():
        assert teacher.name == str(server.model)
        assert teacher.logprob_format.name == "prompt_logprobs"
        found = teacher.signals(batch, needs(batch))
        live = compute_signals(tiny_llama, batch, needs(batch), vocabulary=259)
    logits = live.logits(live.rows)
    told, expected = found.logits(found.rows), coarsen(logits, k, torch.ones(259, 1))
    assert torch.equal(told.ids, expected.ids)
    torch.testing.assert_close(told.log_p, expected.log_p, rtol=0, atol=1e-5)
    torch.testing.assert_close(told.log_rest.exp(), expected.log_rest.exp(), rtol=0, atol=1e-6)
    assert bool(told.log_rest.isneginf().all()) == (k == 259)
    own = logits.log_softmax(-1).gather(-1, supervised_positions(batch)[1][:, None])[:, 0]
    torch.testing.assert_close(found.scores[NEXT_TOKEN_LOG_P], own, rtol=0, atol=1e-5)
    assert len(found.logits(found.rows[4:7])) == 3


def test_both_dialects_say_the_same(letters: str) -> None:
    tokenizer = byte_tokenizer(ascii=True)
    ids = torch.tensor(tokenizer(TEXTS[2]).input_ids)
    batch = collate([{"input_ids": ids, "labels": ids, "lengths": torch.tensor([12, len(ids) - 12])}])
    told = {}
    for dialect in ("prompt_logprobs", "echo with logprobs"):
        with asked(letters, top_k=9, tokenizer=tokenizer, format_name=dialect) as teacher:
            assert teacher.logprob_format.name == dialect
            told[dialect] = teacher.signals(batch, needs(batch))
    first, second = told.values()
    one, other = first.logits(first.rows), second.logits(second.rows)
    assert one.ids.shape == (len(ids) - 2, 9)
    assert torch.equal(one.ids, other.ids)
    assert torch.equal(one.buckets, other.buckets)
    assert torch.equal(first.scores[NEXT_TOKEN_LOG_P], second.scores[NEXT_TOKEN_LOG_P])


def test_a_server_without_prompt_logprobs_is_asked_to_echo(letters: str) -> None:
    def older(body: dict[str, Any], _: int) -> Any:
        refusal = 400, {"error": {"message": "Unrecognized request argument supplied: prompt_logprobs"}}
        return refusal if "prompt_logprobs" in body else body

    with between(letters, older) as url, asked(url, tokenizer=byte_tokenizer(ascii=True)) as teacher:
        assert teacher.logprob_format.name == "echo with logprobs"


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl", "jsd", "total_variation"])
def test_loss_and_gradient_over_the_whole_vocabulary_are_those_of_the_live_teacher(
    objective: str, server: Server, batch: dict[str, Tensor], tiny_llama: LlamaForCausalLM
) -> None:
    with asked(server.url, top_k=259) as teacher:
        losses = [learnt(objective, one, batch, tiny_llama) for one in (teacher, live_teacher(tiny_llama))]
    (loss, gradient), (expected, theirs) = losses
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, theirs, rtol=1e-3, atol=1e-6)


def live_teacher(model: LlamaForCausalLM) -> LlamaForCausalLM:
    same = LlamaForCausalLM(model.config).eval()
    same.load_state_dict(model.state_dict())
    return same


def learnt(objective: str, teacher: Any, batch: dict[str, Tensor], of: LlamaForCausalLM) -> tuple[Tensor, Tensor]:
    """The loss of a student that is nearly the teacher, and the gradient of its embeddings."""
    student = live_teacher(of)
    with torch.no_grad():
        student.model.embed_tokens.weight.mul_(0.9)
    study = TrainingModule(
        student, ObjectiveConfig(name=objective, cross_entropy=0.0).build(), frozen={"teacher": teacher}, vocabulary=259
    )
    loss = study(**batch)["loss"]
    loss.backward()
    gradient = student.model.embed_tokens.weight.grad
    assert gradient is not None
    return loss.detach(), gradient


def test_a_batch_without_a_token_to_learn_asks_nothing(server: Server, batch: dict[str, Tensor]) -> None:
    batch["labels"] = torch.full_like(batch["labels"], IGNORE)
    with asked(server.url) as teacher:
        found = teacher.signals(batch, needs(batch))
    assert len(found.rows) == len(found.scores[NEXT_TOKEN_LOG_P]) == 0
    assert found.logits(found.rows).ids.shape == (0, 20)


def test_hidden_states_are_refused(server: Server, batch: dict[str, Tensor]) -> None:
    with asked(server.url) as teacher, pytest.raises(UnsupportedModel, match="no hidden states"):
        teacher.signals(batch, Needs(supervised_positions(batch)[0], layers=frozenset({-1})))


# asking ahead


def test_packs_that_are_read_are_asked_about_once_and_before_their_batch(
    server: Server, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    requests: list[Any] = []

    def count(body: dict[str, Any], _: int) -> Any:
        requests.append(body["prompt"])
        return body

    rows = [TokenizedDocument(ids, list(ids)) for ids in (list(tiny_tokenizer(text).input_ids) for text in TEXTS)]
    with between(server.url, count) as url, asked(url) as teacher:
        probes = len(requests)
        packs = teacher.prefetch_packs(pack(rows, length=40))
        read = [packs[i] for i in range(len(packs))]
        assert len(packs) == len(read) > 1
        for one in read:
            batch = collate([one])
            teacher.signals(batch, needs(batch))
        assert sorted(requests[probes:]) == sorted(list(row.input_ids) for row in rows)
        assert not teacher._pending
        teacher.signals(batch, needs(batch))
        assert len(requests) > probes + len(rows)


def test_what_waits_is_bounded_and_what_was_let_go_is_asked_again(
    server: Server, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with asked(server.url) as teacher:
        expected = teacher.signals(batch, needs(batch))
        monkeypatch.setattr(served, "PENDING_BYTES", 12 * 20 * 40)  # forty tokens
        for length in range(3, 30):
            ids = torch.arange(50, 50 + length)
            teacher.prefetch({"input_ids": ids, "labels": ids, "lengths": torch.tensor([length])})
        assert 0 < sum(under.num_tokens for under in teacher._pending.values()) <= 40
        found = teacher.signals(batch, needs(batch))
    assert torch.equal(found.scores[NEXT_TOKEN_LOG_P], expected.scores[NEXT_TOKEN_LOG_P])


# faults of the wire


@pytest.mark.parametrize("fault", [(503, {"error": {"message": "busy"}}), (429, "slow down"), (500, ""), None])
def test_a_server_that_fails_now_and_then_is_asked_again(
    fault: Any, server: Server, batch: dict[str, Tensor], quick: None
) -> None:
    with asked(server.url) as steady:
        expected = steady.signals(batch, needs(batch))
    tried: Counter[str] = Counter()

    def fail_twice(body: dict[str, Any], _: int) -> Any:
        tried[str(body["prompt"])] += 1
        return fault if tried[str(body["prompt"])] <= 2 else body

    with between(server.url, fail_twice) as url, asked(url) as teacher:
        found = teacher.signals(batch, needs(batch))
    assert torch.equal(found.scores[NEXT_TOKEN_LOG_P], expected.scores[NEXT_TOKEN_LOG_P])


def test_a_server_that_always_fails_is_named_with_what_to_do(server: Server, quick: None) -> None:
    counts: list[int] = []

    def fail(_: dict[str, Any], n: int) -> Any:
        counts.append(n)
        return 503, {"error": {"message": "out of memory"}}

    with between(server.url, fail) as url, pytest.raises(ServerError, match=r"out of memory.*--resume") as caught:
        ServedTeacher(url, byte_tokenizer())
    assert url in str(caught.value)
    assert len(counts) == http_client.MAX_TRIES


def test_no_server_at_all_is_named_with_what_to_do(quick: None) -> None:
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:9/v1 gave no answer in 6 tries \(ConnectError\)"):
        ServedTeacher("http://127.0.0.1:9/v1", byte_tokenizer())


def test_a_server_that_says_something_else_of_the_same_text_is_refused(server: Server) -> None:
    def fainter(body: dict[str, Any], _: int) -> Any:
        if not isinstance(body["prompt"], str):
            return body
        body.pop("headers")
        call = urllib.request.Request(
            server.url + "/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(call) as found:
            answer = json.load(found)
        for known in answer["choices"][0]["prompt_logprobs"][1:]:
            for token in known.values():
                token["logprob"] -= 0.5
        return 200, answer

    with between(server.url, fainter) as url, pytest.raises(ServerError, match=r"differ by 0\.5 nats"):
        ServedTeacher(url, byte_tokenizer())


def test_a_refusal_is_not_asked_again(server: Server) -> None:
    counts: list[int] = []

    def refuse(_: dict[str, Any], n: int) -> Any:
        counts.append(n)
        return 401, {"error": {"message": "no key"}}

    with between(server.url, refuse) as url, pytest.raises(ServerError, match="its message: no key"):
        ServedTeacher(url, byte_tokenizer())
    assert len(counts) == 2  # once in each dialect


def test_the_key_is_sent_and_never_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-second")
    monkeypatch.setenv("POTSTILL_API_KEY", "sk-secret")
    sent: list[str] = []

    def refuse(body: dict[str, Any], _: int) -> Any:
        sent.append({k.lower(): v for k, v in body["headers"].items()}["authorization"])
        return 401, {"error": {"message": "the key sk-secret is not known"}}

    with between(server.url, refuse) as url, pytest.raises(ServerError, match=r"the key \*\*\* is not known"):
        ServedTeacher(url, byte_tokenizer())
    assert set(sent) == {"Bearer sk-secret"}


def test_at_most_so_many_requests_are_under_way(server: Server, batch: dict[str, Tensor]) -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def slow(body: dict[str, Any], n: int) -> Any:
        return body

    with between(server.url, slow) as url:
        one = http_client.HttpClient(url, max_concurrency=2)
        original = one._client.request

        async def counted(*call: Any, **named: Any) -> Any:
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            try:
                return await original(*call, **named)
            finally:
                with lock:
                    now[0] -= 1

        one._client.request = counted  # type: ignore[method-assign]
        with asked(url, client=one) as teacher:
            teacher.signals(batch, needs(batch))
    assert most[0] == 2


# what would teach wrongly


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://", "not the address of a server"),
        ("ftp://host/v1", "not the address of a server"),
        ("http://host:port/v1", "not an address"),
        ("http://me:secret@host/v1", "POTSTILL_API_KEY"),
        ("http://host/v1?key=secret", "POTSTILL_API_KEY"),
    ],
)
def test_an_address_that_is_none_is_refused_without_showing_its_password(url: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        Address.from_string(url)
    assert "secret" not in str(caught.value)


def test_an_address_can_name_the_model(server: Server) -> None:
    assert Address.from_string("http://host:1/v1/#org/name") == Address("http://host:1/v1", "org/name")
    with pytest.raises(ServerError, match="'hope' does not exist"):
        ServedTeacher(f"{server.url}#hope", byte_tokenizer())


def test_a_server_with_another_tokenizer_is_refused(letters: str, dialect: str) -> None:
    def swap(vocabulary: dict[str, int]) -> None:
        vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]  # of the same width

    with pytest.raises(VocabularyMismatch, match="for the student's tokenizer"):
        ServedTeacher(letters, changed(byte_tokenizer(ascii=True), swap), format_name=dialect)


def changed(tokenizer: PreTrainedTokenizerFast, change: Callable[[dict[str, int]], object]) -> PreTrainedTokenizerFast:
    """`tokenizer` with another table of ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    change(state["model"]["vocab"])
    tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(state))
    return tokenizer


def test_a_server_that_adds_a_token_before_the_text_is_refused_with_both_counts(letters: str, dialect: str) -> None:
    def with_bos(body: dict[str, Any], _: int) -> Any:
        prompt = body["prompt"]
        return {**body, "prompt": "<|im_start|>" + prompt if isinstance(prompt, str) else prompt}

    with (
        between(letters, with_bos) as url,
        pytest.raises(VocabularyMismatch, match=r"reads 45 tokens where .* reads 44"),
    ):
        ServedTeacher(url, byte_tokenizer(ascii=True), format_name=dialect)


def test_a_string_that_two_ids_decode_to_or_none_is_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"\u2581the": 0, "the": 1, "still": 2, "?": 3}, unk_token="?"))
    tokenizer.decoder = decoders.Metaspace()
    by_string = EchoLogprobs(PreTrainedTokenizerFast(tokenizer_object=tokenizer))

    def said(likeliest: str) -> dict[str, Any]:
        logprobs = {"tokens": ["still", "still"], "token_logprobs": [None, -1.0]}
        return {"logprobs": {**logprobs, "top_logprobs": [None, {likeliest: -0.5, "still": -1.0}]}}

    with pytest.raises(VocabularyMismatch, match=r"string 'the', which stands for the ids 0, 1 .*--top-k"):
        by_string.parse(said("the"), [2, 2], 2)
    with pytest.raises(VocabularyMismatch, match=r"string 'hope', which stands for no id"):
        by_string.parse(said("hope"), [2, 2], 2)


def test_half_a_character_is_not_named_and_its_mass_is_the_rests(
    server: Server, batch: dict[str, Tensor], tiny_llama: LlamaForCausalLM
) -> None:
    with asked(server.url, top_k=6, format_name="echo with logprobs") as teacher, torch.no_grad():
        found = teacher.signals(batch, needs(batch))
        live = compute_signals(tiny_llama, batch, needs(batch), vocabulary=259)
    p, told = live.logits(live.rows).softmax(-1), found.logits(found.rows)
    named = ~told.log_p.isneginf()
    assert 0 < named.sum() < named.numel()
    assert bool(named.any(-1).all())
    torch.testing.assert_close(told.log_p.exp()[named], p.gather(-1, told.ids)[named], rtol=0, atol=1e-6)
    torch.testing.assert_close(told.buckets.exp().sum(-1), torch.ones(len(told)), rtol=0, atol=1e-6)


def test_a_server_that_gives_fewer_log_probabilities_names_both_options(server: Server) -> None:
    def cap(body: dict[str, Any], _: int) -> Any:
        k = body["prompt_logprobs"]
        said = f"Requested prompt logprobs of {k}, which is greater than max allowed: 20"
        return body if k <= 20 else (400, {"error": {"message": said, "code": 400}})

    with between(server.url, cap) as url:
        with asked(url, top_k=20):
            pass
        with pytest.raises(UsageError, match=r"max allowed: 20.*--max-logprobs 64.*--top-k"):
            ServedTeacher(url, byte_tokenizer(), top_k=64)


def test_a_server_that_tells_nothing_of_a_prompt_is_refused(server: Server) -> None:
    def forget(body: dict[str, Any], _: int) -> Any:
        return 200, {"choices": [{"text": "", "logprobs": None}]}

    with (
        between(server.url, forget) as url,
        pytest.raises(ServerError, match=r"does not give .* vLLM, SGLang or potstill"),
    ):
        ServedTeacher(url, byte_tokenizer())


@pytest.mark.parametrize(
    ("logprob", "said", "error"),
    [
        (0.0, "sum to 20", ServerError),
        (float("nan"), "sum to nan", ServerError),
        ("high", "another shape", ServerError),
    ],
)
def test_what_is_no_distribution_is_refused(
    logprob: Any, said: str, error: type[Exception], server: Server, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def claim(body: dict[str, Any], _: int) -> Any:
        prompt = body["prompt"]
        ids = tiny_tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        near = range(100, 100 + body["prompt_logprobs"] - 1)
        known = [{str(t): {"logprob": logprob} for t in (own, *near)} for own in ids]
        return 200, {"choices": [{"prompt_logprobs": [None, *known[1:]]}]}

    with between(server.url, claim) as url, pytest.raises(error, match=said):
        ServedTeacher(url, tiny_tokenizer)


def test_an_id_that_the_student_lacks_is_refused(server: Server) -> None:
    tokenizer = changed(
        byte_tokenizer(), lambda vocabulary: vocabulary.pop(max(vocabulary, key=vocabulary.__getitem__))
    )
    with pytest.raises(VocabularyMismatch, match="gives the id 258, and the student's tokenizer ends at 257"):
        ServedTeacher(server.url, tokenizer, top_k=258)


def test_without_its_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(MissingDependency, match=r"pip install 'potstill\[serve\]'"):
        ServedTeacher("http://127.0.0.1:9/v1", byte_tokenizer())


def test_the_thread_ends_with_the_teacher(server: Server) -> None:
    with asked(server.url):
        assert any(thread.name == "potstill-http" for thread in threading.enumerate())
    assert not any(thread.name == "potstill-http" for thread in threading.enumerate())
