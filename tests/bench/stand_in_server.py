"""A server with the outside of vLLM's: health, /server_info, /metrics, and ways to fail.

python stand_in_server.py [vLLM's flags] --port N

STAND_IN (environment, comma-separated) chooses what it does:
    dies        prints a traceback and exits with 3 at once
    oom         says that memory ran out and exits with 1
    unservable  says that the architecture is not supported and exits with 1
    silent      never opens its port
    unhealthy   answers /health with 503
    mute        takes connections and never answers
    mortal      exits with 7 after its first healthy answer
    deaf        ignores SIGTERM
    parent      starts a child that ignores SIGTERM
    bare        its /metrics say nothing
    uneven      its KV cache has a block more for each layer of the model
    opinionated its configuration has a flag that follows from the folder's name
STAND_IN_STARTS names a file that gets a line for each start.
"""

import http.server
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

MODES = set(os.environ.get("STAND_IN", "").split(","))
BLOCK_SIZE = 16
CHILD = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("child ready", flush=True)
time.sleep(600)
"""


def flag(name: str, otherwise: str) -> str:
    """The value of a flag of our command line."""
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else otherwise


def model_folder() -> str:
    """The model as `vllm serve MODEL` or `api_server --model MODEL` name it."""
    if "serve" in sys.argv:
        return sys.argv[sys.argv.index("serve") + 1]
    return flag("--model", "no model")


def num_layers() -> int:
    path = Path(model_folder()) / "config.json"
    return int(json.loads(path.read_text())["num_hidden_layers"]) if path.is_file() else 8


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "mute" in MODES:
            time.sleep(600)
        if path == "/health":
            self.answer("", status=503 if "unhealthy" in MODES else 200)
            if "mortal" in MODES:
                print("ERROR EngineCore encountered a fatal error.", flush=True)
                print("RuntimeError: the engine fell over", flush=True)
                os._exit(7)
        elif path == "/server_info" and os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
            self.answer(json.dumps({"vllm_config": self.config()}))
        elif path == "/metrics":
            self.answer("" if "bare" in MODES else self.metrics())
        elif path == "/one_request":
            self.answer("")
        else:
            self.answer("", status=404)

    def config(self) -> object:
        folder = model_folder()
        flags = {"dtype": flag("--dtype", "auto"), "max_model_len": flag("--max-model-len", "0")}
        if "opinionated" in MODES:
            flags["max_num_seqs"] = str(len(folder))
        return {
            "model_config": {"model": folder, "num_hidden_layers": num_layers(), **flags},
            "cache_config": {"kv_cache_memory_bytes": flag("--kv-cache-memory-bytes", "0")},
            "compilation_config": {"ops": ["none", "+silu"], "passes": [{"fuse": True}]},
        }

    def metrics(self) -> str:
        blocks = 64 + (num_layers() if "uneven" in MODES else 0)
        return (
            "# HELP vllm:prefix_cache_hits_total of the prefix cache\n"
            f'vllm:prefix_cache_hits_total{{engine="0"}} {os.environ.get("STAND_IN_HITS", "0")}\n'
            'vllm:prefix_cache_hits_total{engine="1"} 2.0\n'
            'vllm:num_preemptions_total{engine="0"} 0.0\n'
            f'vllm:cache_config_info{{block_size="{BLOCK_SIZE}",num_gpu_blocks="{blocks}"}} 1.0\n'
            "process_open_fds 7.0\n"
        )

    def answer(self, text: str, *, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
        self.wfile.flush()

    def log_message(self, *words: object) -> None:
        """Say nothing, as with --disable-uvicorn-access-log."""


def main() -> None:
    if starts := os.environ.get("STAND_IN_STARTS"):
        with Path(starts).open("a") as file:
            file.write(f"{os.getpid()} {' '.join(sys.argv[1:])}\n")
    if "deaf" in MODES:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "parent" in MODES:
        child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
    print("INFO Model loading took 0.25 GiB memory and 0.1 seconds", flush=True)
    if "dies" in MODES:
        print("Traceback (most recent call last):\nValueError: no such thing", flush=True)
        print("INFO Shutting down.", flush=True)
        sys.exit(3)
    if "oom" in MODES:
        print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.", flush=True)
        sys.exit(1)
    if "unservable" in MODES:
        print("ValueError: Model architectures ['Odd'] are not supported for now.", flush=True)
        sys.exit(1)
    if "silent" in MODES:
        time.sleep(600)
    address = ("127.0.0.1", int(flag("--port", "0")))
    http.server.ThreadingHTTPServer.allow_reuse_address = True
    http.server.ThreadingHTTPServer(address, Handler).serve_forever()


if __name__ == "__main__":
    main()
