"""`pytest -m hub`: each family's request equals the template that its model ships on the hub today.

    HF_TOKEN=... python -m pytest -m hub tests/templates/test_hub.py -rs

A plain download, because test_chat_templates.py switches huggingface_hub off; the comparison is the one made there with
TRL's copies. HF_ENDPOINT chooses a mirror. A gated repo skips unless HF_TOKEN may read it.

What would fool these tests, and what stands against it:
- the comparison would accept anything: a hub made here hands out TRL's copies, and one changed letter must be found;
- a family is left out: each has its repo, or a reason to have none;
- an error page, or another file than transformers reads: every way a repo may ship its template is tried here.
"""

import contextlib
import http.server
import json
import os
import threading
import urllib.error
import urllib.request
from dataclasses import replace

import pytest

import tests.templates.test_chat_templates as proofs
from tests.helpers.template_oracle import ALL_FAMILIES

FAMILY = {family.name: family for family in ALL_FAMILIES}
HUB = {  # family -> a repo that ships its template
    "qwen2_5": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3": "Qwen/Qwen3-4B",
    "qwen3_instruct_2507": "Qwen/Qwen3-4B-Instruct-2507",
    "qwen3_thinking_2507": "Qwen/Qwen3-4B-Thinking-2507",
    "qwq": "Qwen/QwQ-32B",
    "qwen3_5": "Qwen/Qwen3.5-4B",
    "qwen3_6": "Qwen/Qwen3.6-35B-A3B",
    "qwen3_8": "Qwen/Qwen3.8-27B",
    "llama3": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3_1": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3_2": "meta-llama/Llama-3.2-3B-Instruct",
    "smollm3": "HuggingFaceTB/SmolLM3-3B",
    "gemma2": "google/gemma-2-2b-it",
    "gemma3": "google/gemma-3-4b-it",
    "gemma4": "google/gemma-4-E2B-it",
    "deepseek_r1_distill": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "deepseek_v3": "deepseek-ai/DeepSeek-R1",  # what TRL calls DeepSeek-V3 is what this repo ships
    "phi4": "microsoft/phi-4",
    "glm4_6": "zai-org/GLM-4.6",
    "mistral_nemo": "mistralai/Mistral-Nemo-Instruct-2407",
    "mistral_small_3_2": "mistralai/Mistral-Small-3.2-24B-Instruct-2506",
    "gpt_oss": "openai/gpt-oss-20b",
    "command_a_reasoning": "CohereLabs/command-a-reasoning-08-2025",
    "lfm2_5": "LiquidAI/LFM2.5-230M",
    "nemotron_3": "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "step3_5": "stepfun-ai/Step-3.5-Flash",
    "step3_qwen3": "Qwen/Qwen3-4B",
    "command_a": "CohereLabs/c4ai-command-a-03-2025",
    "deepseek_v3_1": "deepseek-ai/DeepSeek-V3.1",
    "glm4_7": "zai-org/GLM-4.7",
    "granite_4": "ibm-granite/granite-4.0-h-tiny",
    "granite_4_1": "ibm-granite/granite-4.1-8b",
    "kimi_k2": "moonshotai/Kimi-K2-Instruct-0905",
    "kimi_k2_thinking": "moonshotai/Kimi-K2-Thinking",
    "llama4": "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "minimax_m2": "MiniMaxAI/MiniMax-M2.7",
    "ministral_3": "mistralai/Ministral-3-8B-Instruct-2512",
    "ministral_3_reasoning": "mistralai/Ministral-3-8B-Reasoning-2512",
    "mistral_7b_v0_3": "mistralai/Mistral-7B-Instruct-v0.3",
    "nemotron_3_5": "nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-BF16",
    "olmo_3": "allenai/Olmo-3-7B-Instruct",
    "olmo_3_think": "allenai/Olmo-3-7B-Think",
    "phi4_mini": "microsoft/Phi-4-mini-instruct",
    "qwen3_coder": "Qwen/Qwen3-Coder-30B-A3B-Instruct",
    "qwen3_coder_next": "Qwen/Qwen3-Coder-Next",
    "tiny_aya": "CohereLabs/tiny-aya-earth",
}
NONE = {  # family -> why no repo ships it
    "chatml": "a format, no model's",
    "deepseek_r1": "the revision of January 2025; since February the hub's prompt opens the think block (deepseek_v3)",
    "nanochat": "written by Python code, not by a template",
}
KNOWS = {  # facts about the hub's template where TRL carries no copy, so that the oracle need not hold them
    "deepseek_v3_1": {"drops": ("tools",)},
    "glm4_6": {"upstream_arguments": ("enable_thinking",)},
    "glm4_7": {"upstream_arguments": ("enable_thinking", "clear_thinking")},
    "ministral_3_reasoning": {"drops": ("reasoning",)},
    "mistral_small_3_2": {"upstream_date": "%Y-%m-%d"},
    "command_a_reasoning": {"drops": ("tools",)},  # it refuses replies that are strings, ours writes them
    "smollm3": {
        "upstream_arguments": ("enable_thinking", "python_tools"),
        "upstream_date": "%d %B %Y",
        "drops": ("reasoning", "tools"),  # calls in truth: its list of tools is compared below
    },
}


class SameHost(urllib.request.HTTPRedirectHandler):
    """The token stays with the host that it was meant for."""

    def redirect_request(self, request, *rest):
        new = super().redirect_request(request, *rest)
        if new and new.host != request.host:
            new.remove_header("Authorization")
        return new


def shipped(repo, endpoint, token=None):
    """The template of a repo, found where transformers looks for it, in its order."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        request = urllib.request.Request(f"{endpoint}/{repo}/resolve/main/{name}", headers=headers)
        try:
            with urllib.request.build_opener(SameHost).open(request, timeout=60) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                continue
            if error.code == 403 or error.headers.get("X-Error-Code") == "GatedRepo":
                pytest.skip(f"{repo} is gated: accept its licence and set HF_TOKEN")
            pytest.fail(f"{request.full_url}: {error}")
        found = text if name.endswith(".jinja") else json.loads(text).get("chat_template")
        if isinstance(found, list):  # several by name; transformers takes this one
            found = {each["name"]: each["template"] for each in found}["default"]
        if found:
            return found
    pytest.fail(f"{repo} ships no chat template")


def compare(family, source, monkeypatch, folder):
    """What test_chat_templates.py compares with TRL's copy, with this source in the copy's place."""
    (folder / "hub.jinja").write_text(source, encoding="utf-8")
    monkeypatch.setattr(proofs, "UPSTREAM", folder)
    live = replace(family, upstream="hub.jinja", **KNOWS.get(family.name, {}))
    proofs.test_requests_equal_upstreams_on_random_conversations(live)
    with contextlib.suppress(pytest.skip.Exception):  # a family that is told no tools
        proofs.test_tool_lists_equal_upstreams(replace(live, drops=family.drops))


@pytest.mark.hub
@pytest.mark.parametrize("name", HUB)
def test_requests_equal_the_hubs(name, monkeypatch, tmp_path):
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    compare(FAMILY[name], shipped(HUB[name], endpoint, os.environ.get("HF_TOKEN")), monkeypatch, tmp_path)


# ---------------------------------------------------------------- the same, with a hub made here


def test_every_family_has_its_repo_or_a_reason():
    assert {*HUB, *NONE} == {*FAMILY} and not {*HUB} & {*NONE}
    for name, repo in HUB.items():
        head = proofs.template(name).partition("-#}")[0]
        assert repo.split("/")[0] + "/" in head, f"{name}.jinja does not name {repo} or its like"


@pytest.fixture
def fake(monkeypatch):
    """fake[path] = (status, text, headers) is what a hub made here answers; fake["url"] is its address."""
    answers = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, text, headers = answers.get(self.path, (404, "Entry not found", {}))
            if "needs" in headers and headers["needs"] == self.headers.get("Authorization"):
                status = 200
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("no_proxy", "*")
        answers["url"] = f"http://127.0.0.1:{server.server_port}"
        yield answers
        server.shutdown()


def copy(name):
    return (proofs.UPSTREAM / FAMILY[name].upstream).read_text(encoding="utf-8")


def test_a_template_is_found_wherever_a_repo_ships_it(fake):
    listed = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    gated = {"X-Error-Code": "GatedRepo", "needs": "Bearer mine"}
    for path, *answer in (
        ("a/jinja/resolve/main/chat_template.jinja", 200, "yes", {}),
        ("a/jinja/resolve/main/tokenizer_config.json", 200, '{"chat_template": "no"}', {}),
        ("a/json/resolve/main/chat_template.json", 200, '{"chat_template": "yes"}', {}),
        ("a/config/resolve/main/tokenizer_config.json", 200, '{"chat_template": "yes"}', {}),
        ("a/listed/resolve/main/tokenizer_config.json", 200, json.dumps({"chat_template": listed}), {}),
        ("a/moved/resolve/main/chat_template.jinja", 307, "", {"Location": "/elsewhere"}),
        ("elsewhere", 200, "yes", {}),
        ("a/gated/resolve/main/chat_template.jinja", 401, "yes", gated),
        ("a/none/resolve/main/tokenizer_config.json", 200, "{}", {}),
        ("a/lost/resolve/main/chat_template.jinja", 401, "", {"X-Error-Code": "RepoNotFound"}),
    ):
        fake[f"/{path}"] = answer
    for repo in ("a/jinja", "a/json", "a/config", "a/listed", "a/moved"):
        assert shipped(repo, fake["url"]) == "yes"
    assert shipped("a/gated", fake["url"], "mine") == "yes"
    with pytest.raises(pytest.skip.Exception, match="a/gated is gated"):
        shipped("a/gated", fake["url"], "another")
    for repo in ("a/none", "a/lost"):
        with pytest.raises(pytest.fail.Exception, match=repo):
            shipped(repo, fake["url"])


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gemma3", "deepseek_v3"])
def test_one_newline_of_difference_is_found(name, fake, monkeypatch, tmp_path):
    """The live test itself, against TRL's copy: equal as it is, red without the last newline that it writes."""
    monkeypatch.setenv("HF_ENDPOINT", fake["url"])
    source, path = copy(name), f"/{HUB[name]}/resolve/main/tokenizer_config.json"
    before, newline, after = source.rpartition("\\n")
    for text in (source, before + after):
        fake[path] = (200, json.dumps({"chat_template": text}), {})
        if text == source:
            test_requests_equal_the_hubs(name, monkeypatch, tmp_path)
        else:
            with pytest.raises(AssertionError):
                test_requests_equal_the_hubs(name, monkeypatch, tmp_path)
