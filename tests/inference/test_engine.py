"""Texts that come and go get what they would get alone, and harm nobody."""

import concurrent.futures
import dataclasses
import queue
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import plain_loop
from plain_loop import compilations, params_of
import pytest

from topklm.inference.engine import ClosedError, Engine, FullError
from topklm.inference.intervention_batch import InterventionBatch, on_rows
from topklm.inference.interventions import Intervention
from topklm.inference.scheduler import Scheduler, warm_up
from topklm.inference.sequence import Sampling, Sequence, ServingBuckets, default_slots
from topklm.inference.steps import scores_of_prompt
from topklm.model import transformer

# One layer, which is compiled in less time.
CONFIG = dataclasses.replace(plain_loop.CONFIG, n_layers=1, n_nontopk=0)
STOP = 49
SIZES = dataclasses.replace(ServingBuckets.of(CONFIG, 3), slots=(3,))
PATIENCE_SECONDS = 300


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    """Compiling is most of what this file does, and how fast the programs are does not matter here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def slots():
    """With everything compiled, so that whatever else is compiled shows."""
    made = Scheduler(CONFIG, params_of(CONFIG), STOP, SIZES)
    for compile_some in warm_up(made, CONFIG, SIZES):
        compile_some()
    return made


def add_to_three(h, layer, _positions, _prompt_length):
    return h.at[..., 3].add(jnp.where(layer == 0, 3.0, 0.0))


def clamp_eight_behind_the_prompt(h, layer, positions, prompt_length):
    applies = (layer == 0) & (positions >= prompt_length)
    return h.at[..., 8].set(jnp.where(applies, 2.0, h[..., 8]))


# Each as an intervention, and as the same on arrays.
CHANGES = (
    (Intervention(0, 3, 3.0, "add"), add_to_three),
    (Intervention(0, 8, 2.0, "clamp", "generated"), clamp_eight_behind_the_prompt),
    (None, None),
    (None, None),
)


def alone(prompt, sampling, n, change=None, when_full="stop"):
    """What `LanguageModel.generate` gives, as another test has it: by the plain loop."""
    n = min(n, CONFIG.context_length - len(prompt)) if when_full == "stop" else n
    settings = {"stop_token": STOP, "halve": when_full == "halve", "change": change}
    tokens = plain_loop.plain_loop(CONFIG, params_of(CONFIG), prompt, n, sampling, **settings)
    return tokens, "length" if len(tokens) == n else "stop"


def jobs():
    """Twelve texts: greedy and sampled, steered and not, of all lengths; some pass the context of 32."""
    random = np.random.default_rng(0)
    for i in range(12):
        prompt = random.integers(0, STOP, random.integers(1, 31)).tolist()
        prompt[0] = STOP if i % 2 else prompt[0]  # as separator
        limits = {"top_k": 5, "repetition_penalty": 1.3} if i % 4 == 1 else {}
        sampling = Sampling(temperature=float(i % 2), seed=i * 2**31 + i, **limits)
        yield prompt, sampling, int(random.integers(3, 40)), CHANGES[i % 4], ("stop", "slide", "halve")[i % 3]


@pytest.fixture(scope="module")
def expected():
    return [alone(*job[:3], job[3][1], job[4]) for job in jobs()]


def steering(entry):
    return InterventionBatch.of(CONFIG, [entry])


def texts_of(some):
    return [
        Sequence.of(CONFIG, prompt, sampling, n, steer=entry and steering(entry), when_full=when_full)
        for prompt, sampling, n, (entry, _), when_full in some
    ]


def told(text):
    return text.tokens[text.n_prompt :], text.finished


def drawn(expected):
    """Every token that is told of: the stop token too."""
    tokens, finished = expected
    return [*tokens, STOP] if finished == "stop" else tokens


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_whoever_comes_when_gets_what_it_would_get_alone_and_nothing_is_compiled(slots, expected, seed):
    random, texts = np.random.default_rng(seed), texts_of(jobs())
    waiting, new = list(texts), {text: [] for text in texts}
    with compilations() as compiled:
        while waiting or slots.sequences:
            come = min(int(random.integers(0, 4)), SIZES.most_slots - len(slots.sequences), len(waiting))
            if come:
                slots.add(waiting[:come])
                waiting = waiting[come:]
            for text, tokens in slots.decode(int(random.integers(1, 17))):
                new[text] += [token.id for token in tokens]
            if random.integers(2):
                slots.shrink()
    assert [told(text) for text in texts] == expected
    assert list(new.values()) == list(map(drawn, expected))
    assert {finished for _, finished in expected} == {"stop", "length"}
    assert compiled == []


def logits_of(tokens):
    model = transformer.bind(CONFIG, params_of(CONFIG))
    return np.asarray(jax.jit(model)(np.array([tokens]))[0], np.float64)


def log_softmax(logits):
    return (
        logits
        - logits.max(-1, keepdims=True)
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    )


def test_probabilities_are_those_of_the_model_before_penalty_and_temperature(slots):
    settings = {"temperature": 0.5, "top_k": 4, "repetition_penalty": 2.0}
    several = (Sampling(**settings, seed=seed) for seed in range(100))
    sampling = next(one for one in several if len(alone([5, 6, 7], one, 6)[0]) == 6)
    asked = Sequence.of(CONFIG, [5, 6, 7], sampling, 6, n_alternatives=3)
    beside = Sequence.of(CONFIG, [8], Sampling(seed=2), 6)
    slots.add([asked, beside])
    found = []
    while slots.sequences:
        for text, tokens in slots.decode():
            found += tokens if text is asked else []
            assert text is asked or all(token.log_probability is None for token in tokens)
    assert [token.id for token in found] == told(asked)[0]
    assert len(found) == 6
    assert told(asked)[0] == alone([5, 6, 7], sampling, 6)[0]
    reference = log_softmax(logits_of(asked.tokens))
    for place, token in enumerate(found, start=2):
        assert token.id == asked.tokens[place + 1]
        np.testing.assert_allclose(token.log_probability, reference[place, token.id], atol=1e-4)
        best = np.argsort(-reference[place])[:3]
        assert [other for other, _ in token.alternatives] == best.tolist()
        np.testing.assert_allclose([p for _, p in token.alternatives], reference[place, best], atol=1e-4)


def test_the_stop_token_is_told_of_with_its_probability_and_is_no_part_of_the_text(slots):
    prompt, greedy = [5, 6, 7, 8], Sampling(temperature=0)
    drawn = plain_loop.plain_loop(CONFIG, params_of(CONFIG), prompt, 3, greedy)
    ends_at = drawn.index(drawn[2])
    made = Scheduler(CONFIG, params_of(CONFIG), drawn[ends_at], SIZES)
    text = Sequence.of(CONFIG, prompt, greedy, 10, n_alternatives=2)
    made.add([text])
    found = []
    while made.sequences:
        found += made.decode()[0][1]
    assert told(text) == (drawn[:ends_at], "stop")
    assert [token.id for token in found] == drawn[: ends_at + 1]
    reference = log_softmax(logits_of(text.tokens))[-1]
    np.testing.assert_allclose(found[-1].log_probability, reference[found[-1].id], atol=1e-4)
    assert [other for other, _ in found[-1].alternatives] == np.argsort(-reference)[:2].tolist()


def test_a_prompts_probabilities_are_those_of_the_model():
    tokens = np.random.default_rng(4).integers(0, 50, 30).tolist()
    sequence = Sequence.of(CONFIG, tokens, Sampling(), 2)
    found = scores_of_prompt(CONFIG, params_of(CONFIG), sequence, 32)
    reference = log_softmax(logits_of(tokens))
    assert len(found.own) == 29
    np.testing.assert_allclose(found.own, reference[np.arange(29), tokens[1:]], atol=1e-4)
    np.testing.assert_array_equal(found.tokens[:, 0], reference[:29].argmax(-1))
    np.testing.assert_allclose(found.values[:, 0], reference[:29].max(-1), atol=1e-4)


# The thread


class Listener:
    """Collects what it is told."""

    def __init__(self, texts):
        self.tokens = {text: [] for text in texts}
        self.finished = {}
        self._news = queue.SimpleQueue()
        self.deliver = self._news.put

    def hear(self):
        for text, tokens, finished in self._news.get(timeout=PATIENCE_SECONDS):
            self.tokens[text] += [token.id for token in tokens]
            if finished:
                assert text not in self.finished
                self.finished[text] = finished

    def wait(self, n=None):
        while len(self.finished) < (len(self.tokens) if n is None else n):
            self.hear()

    def found(self):
        """As `alone` has it: without the stop token."""
        several = [(self.tokens[text], self.finished[text]) for text in self.tokens]
        return [(tokens[:-1] if finished == "stop" else tokens, finished) for tokens, finished in several]


@pytest.fixture
def engine(slots):
    made = Engine(CONFIG, params_of(CONFIG), STOP, buckets=SIZES, most_waiting=20)
    made.start()
    yield made
    made.close()


def endless():
    """A text that goes on until somebody ends it."""
    return Sequence.of(CONFIG, [3], Sampling(seed=1), 10**6, when_full="halve")


def without_stop(engine):
    """For texts that are to go on: the stop token is none."""
    engine._scheduler._stop = np.int32(-1)
    return engine


def test_texts_of_many_threads_get_what_they_would_get_alone(engine, expected):
    texts = texts_of(jobs())
    listeners = [Listener([text]) for text in texts]

    def ask(number):
        engine.submit([texts[number]], listeners[number].deliver)
        listeners[number].wait()

    with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(ask, range(len(texts))))
    assert [listener.found()[0] for listener in listeners] == expected
    assert engine.load().running == engine.load().waiting == 0


def test_a_text_that_is_given_up_frees_its_row_for_the_next(engine, expected):
    without_stop(engine)
    held = [endless() for _ in range(5)]  # three rows, two wait
    listener = Listener(held)
    engine.submit(held, listener.deliver)
    while sum(map(bool, listener.tokens.values())) < 3:
        listener.hear()
    (job, *_), (text, *_) = jobs(), texts_of(list(jobs())[:1])
    other = Listener([text])
    engine.submit([text], other.deliver)
    engine.abort(held[1:])
    other.wait()
    assert len(other.found()[0][0]) == job[2]
    assert held[0] not in listener.finished
    engine.abort(held[:1])


def test_more_than_may_wait_are_refused_all_or_none(slots):
    engine = Engine(CONFIG, params_of(CONFIG), STOP, buckets=SIZES, most_waiting=2)  # not started
    engine.submit([endless() for _ in range(4)], print)
    with pytest.raises(FullError):
        engine.submit([endless(), endless()], print)
    engine.submit([endless()], print)
    assert (engine.load().waiting, engine.load().most_running) == (5, 3)
    engine.close()


def test_whoever_waits_at_the_end_is_told(engine):
    texts = [endless() for _ in range(4)]
    listener = Listener(texts)
    without_stop(engine).submit(texts, listener.deliver)
    listener.hear()
    engine.close()
    listener.wait()
    assert set(listener.finished.values()) == {"closed"}
    with pytest.raises(ClosedError):
        engine.submit([endless()], print)
    with pytest.raises(ClosedError):
        engine.call(print)


def test_a_fault_ends_the_texts_that_it_hit_and_not_the_engine(engine, expected, monkeypatch):
    monkeypatch.setattr(Scheduler, "decode", lambda *_: 1 / 0)
    lost = Listener([endless()])
    engine.submit(list(lost.tokens), lost.deliver)
    lost.wait()
    assert list(lost.finished.values()) == ["failed"]
    monkeypatch.undo()
    texts = texts_of(list(jobs())[:4])
    listener = Listener(texts)
    engine.submit(texts, listener.deliver)
    listener.wait()
    assert listener.found() == expected[:4]


def test_a_listener_that_fails_harms_nobody(engine, expected):
    engine.submit([Sequence.of(CONFIG, [1], Sampling(), 4)], lambda updates: 1 / 0)
    texts = texts_of(list(jobs())[:2])
    listener = Listener(texts)
    engine.submit(texts, listener.deliver)
    listener.wait()
    assert listener.found() == expected[:2]


def test_other_work_is_done_by_the_engines_thread(engine):
    assert engine.call(lambda: threading.current_thread().name).result(PATIENCE_SECONDS) == "topklm-engine"
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 // 0).result(PATIENCE_SECONDS)


def test_programs_are_compiled_while_nobody_asks_and_a_fault_in_that_harms_nobody(slots, expected):
    engine = Engine(CONFIG, params_of(CONFIG), STOP, buckets=SIZES)
    busy, done, compiled = threading.Event(), threading.Event(), []

    def while_asked():
        busy.set()
        done.wait(PATIENCE_SECONDS)

    later = [lambda: 1 / 0, *engine.programs()[:1], lambda: compiled.append(engine.load())]
    engine.start([while_asked, *later])
    busy.wait(PATIENCE_SECONDS)
    assert engine.load().to_compile == len(later) + 1
    texts = texts_of(list(jobs())[:2])
    listener = Listener(texts)
    engine.submit(texts, listener.deliver)
    done.set()
    listener.wait()
    assert listener.found() == expected[:2]
    while not compiled:
        time.sleep(0.01)
    assert compiled[0].to_compile == 1
    engine.close()


def test_a_text_of_no_new_tokens_has_ended(engine):
    listener = Listener([Sequence.of(CONFIG, [1, 2], Sampling(), 0)])
    engine.submit(list(listener.tokens), listener.deliver)
    listener.wait()
    assert listener.found() == [([], "length")]


# Sizes


def test_sizes_are_few_and_hold_everything():
    for context in (16, 32, 100, 256, 1000, 4096):
        config = dataclasses.replace(CONFIG, context_length=context)
        sizes = ServingBuckets.of(config, 24)
        assert sizes.slots == (1, 4, 16, 24)
        assert len(sizes.prompts) <= 6
        for n in range(1, context + 1):
            assert n <= sizes.prompt(n) <= sizes.cache(n) <= context
            assert sizes.together(n) * sizes.prompt(n) <= 1024 or sizes.together(n) == 1


def test_the_default_batch_fits_a_gibibyte():
    large = dataclasses.replace(
        CONFIG, n_layers=24, d_model=1024, n_heads=16, n_kv_heads=16, context_length=4096
    )
    # 2 x 24 layers x 4,096 tokens x 1,024 numbers of 4 bytes: 768 MiB for a text.
    assert default_slots(large) == 1
    assert default_slots(dataclasses.replace(large, context_length=256)) == 16
    assert default_slots(CONFIG) == 64


def test_interventions_of_rows_are_one_with_each_on_its_row():
    first = InterventionBatch.of(CONFIG, [Intervention(0, 3, 2.0), Intervention(0, 4, -1.0, "scale", (2, 5))])
    second = InterventionBatch.of(CONFIG, [Intervention(0, 3, 7.0, "ablate", "generated")])
    both = on_rows(CONFIG, [(2, first), (5, second)], 6)
    assert len(both.layer) == 64
    assert both.entries() == [
        Intervention(0, 3, 2.0, row=2),
        Intervention(0, 4, -1.0, "scale", (2, 5), row=2),
        Intervention(0, 3, 7.0, "ablate", "generated", row=5),
    ]
    many = [(row, InterventionBatch.of(CONFIG, {(0, n): 1.0 for n in range(20)})) for row in range(4)]
    assert len(on_rows(CONFIG, many, 4).layer) == 512
    assert on_rows(CONFIG, [(0, second)], 1).entries() == [
        Intervention(0, 3, 7.0, "ablate", "generated", row=0)
    ]
    assert [len(on_rows(CONFIG, many[:1], 1).layer), len(on_rows(CONFIG, [(0, first)], 1).layer)] == [64, 8]
    assert on_rows(CONFIG, [], 4) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [50]}, "prompt: token 50 must be from 0 to 49"),
        ({"prompt": [1] * 33}, "prompt has 33 tokens: must be at most 32"),
        ({"max_new_tokens": -1}, "max_new_tokens = -1: must be an integer, 0 or more"),
        ({"when_full": "wrap"}, "when_full = 'wrap': must be one of"),
        ({"sampling": Sampling(top_p=2)}, "top_p = 2: must be above 0"),
    ],
)
def test_a_text_that_cannot_be_is_refused(change, message):
    arguments = {"prompt": [1], "sampling": Sampling(), "max_new_tokens": 4, **change}
    with pytest.raises(ValueError, match=message):
        Sequence.of(CONFIG, **arguments)
