"""OpenVINO GenAI's ContinuousBatchingPipeline behind as little HTTP as serving.py needs: POST /v1/completions of token ids, streamed.

python serve_openvino.py MODEL PORT THREADS KV_TOKENS STEP SEQS

One thread steps the pipeline, as OpenVINO's model server does; the other reads and writes. Tokens are not made into text, which spares
the pipeline work that the others do.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

BLOCK = 32  # tokens of a block of the KV cache on CPUs


class Engine:
    """handles: of the requests in hand, with what to call with the number of new tokens."""

    def __init__(self, model: str, threads: int, kv_tokens: int, step: int, seqs: int):
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_seqs, scheduler.max_num_batched_tokens = seqs, step
        scheduler.cache_size, scheduler.num_kv_blocks = 0, -(-kv_tokens // BLOCK)
        scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self.pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self.handles: dict[int, tuple[Any, Any]] = {}
        self.n_requests = 0
        self.changed = threading.Condition()

    def add(self, prompt: list[int], n: int, tell: Any) -> int:
        config = genai.GenerationConfig(max_new_tokens=n, min_new_tokens=n, ignore_eos=True, do_sample=False)
        with self.changed:
            self.n_requests += 1
            handle = self.pipeline.add_request(self.n_requests, ov.Tensor(np.array([prompt], np.int64)), config)
            self.handles[self.n_requests] = (handle, tell)
            self.changed.notify()
            return self.n_requests

    def drop(self, request: int) -> None:
        with self.changed:
            handle, _ = self.handles.pop(request, (None, None))
        if handle is not None:
            handle.stop()

    def run(self) -> None:
        """Step as long as there is work; tell what has come."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.handles)
                now = list(self.handles.values())
            if self.pipeline.has_non_finished_requests():
                self.pipeline.step()
            for handle, tell in now:
                n = 0
                while handle.can_read():
                    n += sum(len(o.generated_ids) for o in handle.read().values())
                if n:
                    tell(n)


async def answer(engine: Engine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One request of a connection, which is then closed."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    try:
        if not head[0].startswith("POST /v1/completions "):
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            return
        fields = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
        body = json.loads(await reader.readexactly(int(fields["content-length"])))
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/event-stream\r\n\r\n")
        await stream(engine, body, reader, writer)
    except ConnectionError:
        pass
    finally:
        writer.close()


async def stream(
    engine: Engine, body: Mapping[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[int]()
    request = engine.add(body["prompt"], body["max_tokens"], lambda n: loop.call_soon_threadsafe(queue.put_nowait, n))
    gone = asyncio.ensure_future(reader.read(1))
    n_tokens = 0
    try:
        while n_tokens < body["max_tokens"]:
            more = asyncio.ensure_future(queue.get())
            await asyncio.wait({more, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not more.done():
                more.cancel()
                return
            n_tokens += more.result()
            writer.write(b'data: {"choices":[{"index":0,"text":"x"}]}\n\n')
            await writer.drain()
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": n_tokens}
        writer.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")
        await writer.drain()
    finally:
        gone.cancel()
        engine.drop(request)


async def main(model: str, port: str, *numbers: str) -> None:
    engine = Engine(model, *map(int, numbers))
    threading.Thread(target=engine.run, daemon=True).start()
    server = await asyncio.start_server(lambda r, w: answer(engine, r, w), "127.0.0.1", int(port))
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
