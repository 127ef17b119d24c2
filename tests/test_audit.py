"""The dependency audit reports what its source knows, and disbelieves a source that misses a known vulnerability."""

import http.server
import json
import threading

import audit
import pytest

HOLE = {"id": "PYSEC-0000-1", "fixed_in": ["1.1"], "withdrawn": None}


def page(newest, vulnerabilities=(), withdrawn=()):
    files = {version: [{"yanked": True, "yanked_reason": "broken"}] for version in withdrawn}
    releases = {newest: [{"yanked": False, "yanked_reason": None}]} | files
    return {"info": {"version": newest}, "vulnerabilities": list(vulnerabilities), "releases": releases}


@pytest.fixture
def index(monkeypatch):
    """Pages of a package index at the address that pip is set to use; the audit's vulnerable release is on it."""

    pages = {name: page(version, [HOLE]) for name, version in audit.VULNERABLE.items()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            _, pypi, name, _ = self.path.split("/")
            found = pypi == "pypi" and name in pages
            body = json.dumps(pages[name]).encode() if found else b""
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple/")
        yield pages
        server.shutdown()


def ask(versions):
    return audit.from_index(versions | audit.VULNERABLE).believed()


def test_the_newest_release_is_known_an_older_one_only_if_withdrawn(index):
    index |= {
        "clean": page("1.0"),
        "holed": page("1.0", [HOLE, HOLE | {"id": "PYSEC-0000-2", "withdrawn": "2026-01-01"}]),
        "old": page("1.1", [HOLE]),
        "pulled": page("1.1", withdrawn=["1.0"]),
    }
    answers = ask(dict.fromkeys(("clean", "holed", "old", "pulled", "absent"), "1.0"))
    assert answers.why == ""
    assert answers.findings == {
        "clean": [],
        "holed": ["holed 1.0: PYSEC-0000-1, mended in 1.1"],
        "pulled": ["pulled 1.0: withdrawn: broken"],
    }


def test_an_index_that_drops_advisories_is_not_believed(index):
    index |= {"clean": page("1.0")} | {name: page(version) for name, version in audit.VULNERABLE.items()}
    answers = ask({"clean": "1.0"})
    assert answers.findings == {}
    assert "known ones" in answers.why


def test_without_an_index_there_is_no_answer(index, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    answers = ask({"clean": "1.0"})
    assert answers.findings == {}
    assert answers.why == "ConnectionError"


@pytest.mark.parametrize(
    ("findings", "code", "printed"),
    [
        ({"jinja2": ["jinja2 2.10: PYSEC-2019-217, mended in 2.10.1"]}, 1, "jinja2 2.10: PYSEC-2019-217"),
        ({"jinja2": []}, 0, "0 known vulnerabilities; unknown: none"),
        ({}, 0, "NOT DONE"),
    ],
)
def test_a_finding_fails_and_silence_is_named(findings, code, printed, monkeypatch, capsys):
    vulnerable = {name: ["known"] for name in audit.VULNERABLE}
    monkeypatch.setattr(audit, "closure", lambda name: {"jinja2": "2.10"})
    monkeypatch.setattr(audit, "from_pip_audit", lambda versions: audit.Answers("pip-audit", findings | vulnerable))
    monkeypatch.setattr(audit, "from_index", lambda versions: audit.Answers("the index", why="Timeout"))
    assert audit.main() == code
    assert printed in capsys.readouterr().out
