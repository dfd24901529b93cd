"""Whether output under a JSON Schema keeps to it, by generated schemas; and what a mask costs.

    python benchmarks/constrained_schemas.py [--n 1000] [--seed 0] [--model lab-8m] [--json]
    python benchmarks/constrained_schemas.py --masks FOLDER [--pre llama-bpe]

The first form generates schemas: most of them of supported features, nested, some with a keyword that cannot be kept or a
mistake. Those that are accepted run to their end, half of them greedy; what ended is parsed and validated by the
`jsonschema` package, what was cut off by --max-tokens is counted apart. Those that are refused must name the keyword that
was planted, or the property in which. The second form times the mask of each token, and all that a constrained token costs
over a free one, for the vocabulary of a folder, along documents that keep to some constraints.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from time import perf_counter
from typing import Any

import jsonschema
import numpy as np

from paceline.checkpoints.tokenizer import Tokenizer
from paceline.core.errors import RequestError
from paceline.core.sequence import Sequence
from paceline.core.types import Constraint, Request, SamplingParams
from paceline.llm import LLM
from paceline.techniques.output.llguidance import Masks
from paceline.techniques.parts.grammar import Grammars, Mask

WORDS = ["name", "age", "price", "tags", "items", "code", "note", "size", "ready", "address", "city", "first-name", "last_name",
         "id", "größe", "名", "a", "b", "x", "y"]  # fmt: skip
PATTERNS = [
    "^[A-Z]{2,4}$",
    "^[a-z]+-[0-9]{2}$",
    "^(foo|bar)+$",
    "^#[0-9a-f]{6}$",
    r"^\d{3}$",
    "x[yz]?",
    "^v[0-9]+\\.[0-9]+$",
    "^é{1,2}$",
]
FORMATS = ["date", "uuid", "ipv4", "date-time", "time", "email", "hostname", "duration", "ipv6", "uri"]
PLANTED: list[tuple[str, dict[str, Any]]] = [
    ("not", {"not": {"type": "null"}}),
    ("if", {"if": {"type": "string"}, "then": {"maxLength": 3}}),
    ("uniqueItems", {"type": "array", "uniqueItems": True}),
    ("contains", {"type": "array", "contains": {"type": "integer"}}),
    ("propertyNames", {"type": "object", "propertyNames": {"pattern": "^a"}}),
    ("dependentRequired", {"type": "object", "dependentRequired": {"a": ["b"]}}),
    ("dependentSchemas", {"type": "object", "dependentSchemas": {"a": {"type": "object"}}}),
    ("unevaluatedProperties", {"type": "object", "unevaluatedProperties": False}),
    ("additionalItems", {"type": "array", "items": [{"type": "null"}], "additionalItems": False}),
    ("format", {"type": "string", "format": "json-pointer"}),
    ("pattern", {"type": "string", "pattern": "^(?!x)"}),
    ("pattern", {"type": "string", "pattern": "("}),
    ("oneOf", {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 2}]}),
    ("type", {"type": "float"}),
    ("minimum", {"type": "integer", "minimum": 4, "maximum": 3}),
    ("maxLength", {"type": "string", "maxLength": "3"}),
    ("minItems", {"type": "array", "minItems": -1}),
    ("$ref", {"$ref": "#/$defs/nowhere"}),
    ("$ref", {"$ref": "https://example.org/schema"}),
    ("required", {"type": "object", "required": "a"}),
    ("enum", {"enum": []}),
    ("multipleOf", {"type": "integer", "multipleOf": 0}),
]  # fmt: skip


class Maker:
    """Random schemas. Texts and arrays are bounded, so that most outputs end."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)

    def schema(self) -> tuple[Any, str | None]:
        """A schema, and the keyword for which it should be refused."""
        r = self.rng
        if r.random() < 0.12:
            keyword, planted = r.choice(PLANTED)
            return self._object(1, {**self._properties(1), "planted": planted}, always="planted"), keyword
        body = self._any(r.choice([1, 2, 3]))
        if r.random() < 0.08:
            node = self._object(0)
            link = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
            node["properties"]["next"] = link
            node.pop("maxProperties", None)
            body = {"$defs": {"node": node, "leaf": self._leaf()}, **self._object(0, {"head": {"$ref": "#/$defs/node"},
                    "leaf": {"$ref": "#/$defs/leaf"}}, always="head")}  # fmt: skip
        return body, None

    def _any(self, depth: int) -> dict[str, Any]:
        r = self.rng
        if depth <= 0 or r.random() < 0.25:
            return self._leaf()
        kind = r.choice(["object", "object", "object", "array", "tuple", "anyOf", "oneOf", "allOf"])
        if kind == "object":
            return self._object(depth)
        if kind == "array":
            low = r.randint(0, 2)
            return {"type": "array", "items": self._any(depth - 1), "minItems": low, "maxItems": low + r.randint(0, 2)}
        if kind == "tuple":
            items = [self._any(depth - 1) for _ in range(r.randint(1, 3))]
            return {"type": "array", "prefixItems": items, "minItems": len(items), "items": False}
        if kind == "allOf":
            low = r.randint(-9, 9)
            return {"allOf": [{"type": "integer", "minimum": low}, {"maximum": low + r.randint(0, 99)}]}
        if kind == "oneOf":
            branches = [self._object(0, {"kind": {"const": f"k{i}"}}, always="kind") for i in range(r.randint(2, 3))]
            return {"oneOf": branches}
        return {"anyOf": [self._any(depth - 1) for _ in range(r.randint(2, 3))]}

    def _properties(self, depth: int) -> dict[str, Any]:
        return {name: self._any(depth - 1) for name in self.rng.sample(WORDS, self.rng.randint(1, 4))}

    def _object(self, depth: int, properties: dict[str, Any] | None = None, always: str = "") -> dict[str, Any]:
        r = self.rng
        properties = {**self._properties(depth), **(properties or {})}
        found: dict[str, Any] = {"type": "object", "properties": properties}
        found["required"] = [n for n in properties if n == always or r.random() < 0.7]
        extra = r.random()
        if extra < 0.8:
            found["additionalProperties"] = False
        elif extra < 0.96:
            found["additionalProperties"] = self._leaf()
            found["maxProperties"] = len(properties) + 1
        if r.random() < 0.1 and extra < 0.8:
            found["patternProperties"] = {"^z[0-9]$": self._leaf()}
            found["maxProperties"] = len(properties) + 1
        if "maxProperties" in found:
            found["required"] = list(
                properties
            )  # llguidance counts properties only where all that are listed must be there
        if r.random() < 0.2:
            found["title"], found["description"] = "T", 'what "it" is'
        return found

    def _leaf(self) -> dict[str, Any]:
        r = self.rng
        kind = r.choice(["string", "length", "pattern", "format", "integer", "range", "number", "multiple", "boolean",
                         "null", "enum", "const", "types"])  # fmt: skip
        low = r.choice([0, 0, 1, -5, 10, 99, -1000])
        if kind == "string":
            return {"type": "string", "maxLength": r.choice([0, 1, 8, 20])}
        if kind == "length":
            return {"type": "string", "minLength": r.randint(1, 4), "maxLength": r.randint(4, 12)}
        if kind == "pattern":
            return {"type": "string", "pattern": r.choice(PATTERNS), "maxLength": 12}
        if kind == "format":
            return {"type": "string", "format": r.choice(FORMATS), "maxLength": 40}
        if kind == "integer":
            return {"type": "integer", "minimum": -(10**6), "maximum": 10**6}
        if kind == "range":
            return {"type": "integer", "exclusiveMinimum": low, "maximum": low + r.randint(1, 5000)}
        if kind == "number":
            return {"type": "number", "minimum": low + 0.25, "exclusiveMaximum": low + r.choice([0.5, 7, 1000.125])}
        if kind == "multiple":
            return {"type": "integer", "multipleOf": r.choice([2, 5, 7, 100]), "minimum": 0, "maximum": 10**4}
        if kind == "enum":
            return {"enum": r.sample(["a", "b c", 'q"', "", 1, 2.5, -3, None, True, [1], {"k": "v"}], r.randint(1, 4))}
        if kind == "const":
            return {"const": r.choice(["x", 0, None, "é\n", {"a": [1, {"b": None}]}, [], {}])}
        if kind == "types":
            return {"type": ["boolean", "null"]}
        return {"type": kind}


def verdict(text: str, finish: str | None, schema: Any) -> str:
    """ "valid", "truncated", "error", or what is wrong with the output; "format" when only a format's checker objects."""
    if finish != "stop":
        return "truncated" if finish == "length" else str(finish)
    try:
        value = json.loads(text)
    except ValueError as e:
        return f"INVALID: not JSON: {e}"
    checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    wrong = next(iter(checker.iter_errors(value)), None)
    if wrong is None:
        return "valid"
    # RFC 3339 has the year 0000, Python has not; and llguidance knows a date's shape, not how many days a month has
    shape = jsonschema.Draft202012Validator(schema).is_valid(value)
    return f"{'format' if shape else 'INVALID'}: {wrong.message[:200]}"


def conformance(args: argparse.Namespace) -> dict[str, Any]:
    maker = Maker(args.seed)
    schemas = [maker.schema() for _ in range(args.n)]
    counts: Counter[str] = Counter()
    wrong: list[tuple[str, str]] = []
    refusals: Counter[str] = Counter()
    compile_ms: list[float] = []
    jobs: list[tuple[Any, SamplingParams]] = []
    with LLM(args.model, context=2048) as llm:
        assert llm.tokenizer is not None
        front = Grammars(llm.tokenizer)
        front.compile(Constraint("json_object"))
        for i, (schema, planted) in enumerate(schemas):
            constraint = Constraint("json_schema", json.dumps(schema, ensure_ascii=bool(i % 2)))
            start = perf_counter()
            try:
                front.compile(constraint)
            except RequestError as e:
                named = planted is not None and (planted in str(e) or "'planted'" in str(e))
                counts["refused, names the keyword" if named else "refused otherwise"] += 1
                refusals[planted or "?"] += 1
                if not named:
                    wrong.append((json.dumps(schema), str(e)))
                continue
            compile_ms.append(1e3 * (perf_counter() - start))
            if planted is not None:
                counts["accepted, though planted"] += 1
                wrong.append((json.dumps(schema), f"accepted with {planted}"))
            temperature = 0.0 if i % 2 else args.temperature
            jobs.append(
                (
                    schema,
                    SamplingParams(temperature=temperature, seed=i, max_tokens=args.max_tokens, constraint=constraint),
                )
            )
        start = perf_counter()
        outputs = llm.generate(["A record as JSON: "] * len(jobs), [p for _, p in jobs])
        seconds = perf_counter() - start
        front.close()
    n_tokens = 0
    for (schema, _), output in zip(jobs, outputs, strict=True):
        c = output.completions[0]
        n_tokens += len(c.token_ids)
        said = verdict(c.text, c.finish_reason, schema)
        counts[said.split(":")[0]] += 1
        if said.startswith(("INVALID", "error", "format")):
            wrong.append((json.dumps(schema), f"{said} | {output.error} | {c.text[:300]}"))
    return {
        "n": args.n, "seed": args.seed, "counts": dict(sorted(counts.items())), "refused_for": dict(sorted(refusals.items())),
        "compile_ms": {"median": float(np.median(compile_ms)), "p99": float(np.quantile(compile_ms, 0.99)), "max": max(compile_ms)},
        "tokens": n_tokens, "seconds": seconds, "wrong": sorted(wrong, key=lambda w: not w[1].startswith("INVALID"))[: args.show],
    }  # fmt: skip


def masks(args: argparse.Namespace) -> dict[str, Any]:
    """Microseconds per token along one document for each of some schemas, the tokenisation being the tokenizer's own."""
    tokenizer = Tokenizer.from_folder(args.masks, pre=args.pre)
    eos = min(tokenizer.ends, default=tokenizer.n_vocab - 1)
    part = Masks(tokenizer, frozenset({eos}))
    assert part.grammars is not None
    start = perf_counter()
    part.grammars.compile(Constraint("json_object"))
    first = perf_counter() - start
    text = {"type": "string"}
    record = {
        "name": "Ada Lovelace",
        "age": 36,
        "tags": ["first", "of many"],
        "note": "She wrote, in 1843, notes on the engine.",
    }
    schema = {"type": "object", "properties": {"name": text, "age": {"type": "integer"}, "tags": {"type": "array", "items": text},
              "note": {**text, "maxLength": 200}}, "required": ["name", "age", "tags", "note"], "additionalProperties": False}  # fmt: skip
    cases = {
        "schema": (Constraint("json_schema", json.dumps(schema)), json.dumps(record)),
        "json_object": (Constraint("json_object"), json.dumps(record, indent=2)),
        "regex": (Constraint("regex", r"(\w+[ ,.:;]*)+"), "The quick brown fox jumps, over: the lazy dog. " * 4),
        "choice of 1000": (
            Constraint("choice", json.dumps([f"option number {i}" for i in range(1000)])),
            "option number 777",
        ),
    }
    logits = np.random.default_rng(0).standard_normal(tokenizer.n_vocab).astype(np.float32)
    rows = {
        name: _along(part, c, tokenizer.encode(t, add_special_tokens=False), logits) for name, (c, t) in cases.items()
    }
    part.grammars.close()
    return {"n_vocab": tokenizer.n_vocab, "first_constraint_s": first, "us": rows}


def _along(part: Masks, constraint: Constraint, tokens: list[int], logits: np.ndarray) -> dict[str, float]:
    assert part.grammars is not None
    start = perf_counter()
    grammar = part.grammars.compile(constraint)
    compiled = perf_counter() - start
    matcher, alone, whole = grammar.matcher(), [], []
    for token in tokens:
        start = perf_counter()
        allowed = Mask(matcher, part.grammars.n_vocab)
        alone.append(perf_counter() - start)
        assert token in allowed, "the document does not keep to its constraint"
        matcher.consume_token(token)
    request = Request("r", (1,), SamplingParams(constraint=constraint))
    seq = Sequence(0, request, 0, [1], 1, 0, 1 << 20)
    for token in tokens:
        row = logits.copy()
        start = perf_counter()
        part.apply(row, seq, seq.tokens)
        whole.append(perf_counter() - start)
        seq.tokens.append(token)
    assert seq.error is None
    found = {"compile_ms": 1e3 * compiled, "tokens": len(tokens), "apply_max": 1e6 * max(whole)}
    for name, seconds in (("mask", alone), ("apply", whole)):
        found[f"{name}_median"] = 1e6 * float(np.median(seconds))
        found[f"{name}_mean"] = 1e6 * float(np.mean(seconds))
    return found


def show(found: dict[str, Any]) -> None:
    if "us" in found:
        print(f"vocabulary {found['n_vocab']:,}; the first constraint takes {found['first_constraint_s']:.2f} s")
        print(
            f"{'':16s}{'compile ms':>11s}{'tokens':>8s}{'mask':>8s}{'mean':>8s}{'apply':>8s}{'mean':>8s}{'max':>8s}   (us per token)"
        )
        for name, r in found["us"].items():
            print(f"{name:16s}{r['compile_ms']:11.1f}{r['tokens']:8d}{r['mask_median']:8.0f}{r['mask_mean']:8.0f}"
                  f"{r['apply_median']:8.0f}{r['apply_mean']:8.0f}{r['apply_max']:8.0f}")  # fmt: skip
        return
    print(f"{found['n']} schemas, seed {found['seed']}; {found['tokens']} tokens in {found['seconds']:.1f} s")
    for name, n in found["counts"].items():
        print(f"  {name:32s}{n:6d}")
    print("  refused for " + ", ".join(f"{k} {n}" for k, n in found["refused_for"].items()))
    print("  check and compile, ms: " + ", ".join(f"{k} {v:.1f}" for k, v in found["compile_ms"].items()))
    for schema, said in found["wrong"]:
        print(f"WRONG {said}\n      {schema[:1500]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="lab-8m")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=900)
    parser.add_argument("--show", type=int, default=20, help="how many of those that went wrong are printed")
    parser.add_argument("--masks", metavar="FOLDER", help="time masks for the tokenizer of this folder instead")
    parser.add_argument("--pre", help="with --masks: how the tokenizer splits words, for folders that do not say")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = masks(args) if args.masks else conformance(args)
    if args.json:
        print(json.dumps(found))
    else:
        show(found)
    raise SystemExit(1 if any(not said.startswith("format") for _, said in found.get("wrong", ())) else 0)


if __name__ == "__main__":
    main()
