#!/usr/bin/env python3
"""A Hub on loopback: enough of the Hugging Face Hub's HTTP API for the real `huggingface_hub`,
`transformers` and `datasets` clients to create repositories, push to them and load from them.

    python local_hub.py --root DIR [--port 0] [--port-file FILE]

Clients: HF_ENDPOINT=http://127.0.0.1:PORT HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_local
Repositories live under DIR/<type>s/<owner>/<name>/<commit sha>/..., with DIR/.../refs.json.

Tokens: hf_local may do everything, hf_reader only read, any other is refused; private repositories need one.
Faults: DIR/faults.json `{"download": {"match": part of the path, "bytes": N, "times": K}, "commit": K}` breaks a download
off after N bytes, and answers the next K commits with 500. A download with "hang": true does not break off after its N bytes
but waits (for the server to be killed) and leaves a file DIR/hanging. DIR/access.log lists requests, with their byte ranges.
"""

import argparse
import base64
import datetime
import functools
import hashlib
import json
import os
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LOCK = threading.RLock()


class Store:
    def __init__(self, root: Path):
        self.root = root
        (root / "lfs").mkdir(parents=True, exist_ok=True)

    def repo(self, kind, repo_id):
        return self.root / f"{kind}s" / repo_id

    def refs(self, kind, repo_id):
        file = self.repo(kind, repo_id) / "refs.json"
        return json.loads(file.read_text()) if file.exists() else None

    def create(self, kind, repo_id, private):
        with LOCK:
            if self.refs(kind, repo_id) is not None:
                return False
            main = self._snapshot(kind, repo_id, None, {}, [])
            self.write(kind, repo_id, {"branches": {"main": main}, "tags": {}, "log": [], "private": bool(private)})
            return True

    def write(self, kind, repo_id, state):
        (self.repo(kind, repo_id) / "refs.json").write_text(json.dumps(state))

    def fault(self, name, path=""):
        """The planned fault, if it is to happen now; counts it."""
        with LOCK:
            file = self.root / "faults.json"
            plan = json.loads(file.read_text()) if file.exists() else {}
            fault = plan.get(name)
            if fault is None or (name == "download" and fault["match"] not in path):
                return None
            times = (fault["times"] if name == "download" else fault) - 1
            plan[name] = None if times <= 0 else (fault | {"times": times} if name == "download" else times)
            file.write_text(json.dumps(plan))
            return fault

    def _snapshot(self, kind, repo_id, parent, adds, deletes):
        base = self.repo(kind, repo_id)
        stamp = f"{datetime.datetime.now().isoformat()}{parent}{sorted(adds)}{deletes}"
        sha = hashlib.sha1(stamp.encode()).hexdigest()
        target = base / sha
        if parent:
            shutil.copytree(base / parent, target, copy_function=os.link)
        target.mkdir(parents=True, exist_ok=True)
        for path in deletes:
            victim = target / path
            shutil.rmtree(victim) if victim.is_dir() else victim.unlink(missing_ok=True)
        for path, content in adds.items():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).unlink(missing_ok=True)  # the link, not the file of the commit before
            (target / path).write_bytes(content)
        return sha

    def commit(self, kind, repo_id, branch, adds, deletes, title, create_pr=False):
        """Sha, and the number of the pull request if there is one."""
        with LOCK:
            state = self.refs(kind, repo_id)
            parent, number = state["branches"][branch], None
            if create_pr:
                number = 1 + sum(name.startswith("refs/pr/") for name in state["branches"])
                branch = f"refs/pr/{number}"
            sha = self._snapshot(kind, repo_id, parent, adds, deletes)
            state["branches"][branch] = sha
            state["log"].append({"id": sha, "title": title})
            self.write(kind, repo_id, state)
            return sha, number

    def resolve(self, kind, repo_id, revision):
        state = self.refs(kind, repo_id)
        if state is None:
            return None
        revision = revision or "main"
        refs = state["tags"] | state["branches"]
        sha = refs.get(revision.removeprefix("refs/heads/"), revision)
        return sha if (self.repo(kind, repo_id) / sha).is_dir() else None

    def files(self, kind, repo_id, sha):
        base = self.repo(kind, repo_id) / sha
        return {str(p.relative_to(base)): p for p in sorted(base.rglob("*")) if p.is_file()}


def is_lfs(path, size):
    return path.endswith((".safetensors", ".parquet", ".bin", ".arrow", ".ckpt", ".mp4")) or size > 1_000_000


@functools.cache  # files of a commit never change
def entry(path, file):
    data = file.read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    row = {"type": "file", "oid": oid, "size": len(data), "path": path}
    if is_lfs(path, len(data)):
        row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return row


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *args):
        with open(self.store.root / "access.log", "a") as log:
            log.write(f"{self.command} {self.path} {self.headers.get('Range', '')}".rstrip() + "\n")

    def reply(self, code, body=b"", headers=None, ctype="application/json"):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", ctype)
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, what):
        self.reply(404, {"error": what}, {"X-Error-Code": what, "X-Error-Message": what})

    def token(self):
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def refused(self, write=False):
        """Whether the token does not do, after an answer that says so as the Hub does."""
        text = "Invalid credentials in Authorization header"
        if self.token() not in ("", "hf_local", "hf_reader") or (write and not self.token()):
            self.reply(401, {"error": text}, {"X-Error-Message": text})
            return True
        if write and self.token() == "hf_reader":
            text = "Forbidden: this token may only read."
            self.reply(403, {"error": text}, {"X-Error-Message": text})
            return True
        return False

    def hidden(self, kind, repo_id):
        """Whether there is no such repository for this user, after an answer that says so."""
        state = self.store.refs(kind, repo_id)
        if state is not None and not (state["private"] and not self.token()):
            return False
        self.reply(
            401 if not self.token() else 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        )
        return True

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            out = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                out += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def base(self):
        return f"http://{self.headers['Host']}"

    def do_HEAD(self):
        self.do_GET()

    def do_PUT(self):
        data = self.body()
        (self.store.root / "lfs" / self.path.rsplit("/", 1)[1]).write_bytes(data)
        self.reply(200, b"")

    def do_DELETE(self):
        self.body()
        self.reply(200, {})

    def do_GET(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        query = parse_qs(url.query)
        if self.refused():
            return None
        if path == "/api/whoami-v2":
            return self.reply(
                200,
                {
                    "type": "user",
                    "name": "tester",
                    "fullname": "tester",
                    "orgs": [{"name": "galilai"}],
                    "auth": {"type": "access_token", "accessToken": {"role": "write"}},
                },
            )
        if m := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.info(m[1], m[2], m[3])
        if m := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)/refs", path):
            if self.hidden(m[1], m[2]):
                return None
            state = self.store.refs(m[1], m[2])
            return self.reply(
                200,
                {
                    "branches": [
                        {"name": n, "ref": f"refs/heads/{n}", "targetCommit": s}
                        for n, s in state["branches"].items()
                        if not n.startswith("refs/pr/")
                    ],
                    "converts": [],
                    "tags": [
                        {"name": n, "ref": f"refs/tags/{n}", "targetCommit": s} for n, s in state["tags"].items()
                    ],
                    "pullRequests": [
                        {"name": n, "ref": n, "targetCommit": s}
                        for n, s in state["branches"].items()
                        if n.startswith("refs/pr/")
                    ],
                },
            )
        if m := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)/commits/(.+)", path):
            state = self.store.refs(m[1], m[2])
            now = datetime.datetime.now(datetime.UTC).isoformat()
            return self.reply(
                200,
                [
                    {"id": c["id"], "title": c["title"], "message": "", "authors": [], "date": now}
                    for c in reversed(state["log"])
                ],
            )
        if m := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)/tree/(refs/pr/\d+|[^/]+)(?:/(.*))?", path):
            return self.tree(
                m[1],
                m[2],
                m[3],
                (m[4] or "").strip("/"),
                query.get("recursive", ["false"])[0].lower() in ("true", "1"),
            )
        if m := re.fullmatch(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", path):
            return self.resolve(m[1] or "model", m[2], m[3], m[4])
        return self.missing("EntryNotFound")

    def info(self, kind, repo_id, revision):
        if self.hidden(kind, repo_id):
            return None
        sha = self.store.resolve(kind, repo_id, revision)
        if sha is None:
            return self.missing("RevisionNotFound")
        files = self.store.files(kind, repo_id, sha)
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.reply(
            200,
            {
                "id": repo_id,
                "modelId": repo_id,
                "author": repo_id.split("/")[0],
                "sha": sha,
                "lastModified": now,
                "createdAt": now,
                "private": self.store.refs(kind, repo_id)["private"],
                "disabled": False,
                "gated": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [{"rfilename": f} for f in files],
                "cardData": {},
            },
        )

    def tree(self, kind, repo_id, revision, folder, recursive):
        if self.hidden(kind, repo_id):
            return None
        sha = self.store.resolve(kind, repo_id, revision)
        if sha is None:
            return self.missing("RevisionNotFound")
        rows, folders = [], set()
        for name, file in self.store.files(kind, repo_id, sha).items():
            if folder and not name.startswith(folder + "/"):
                continue
            rest = name[len(folder) + 1 :] if folder else name
            parts = rest.split("/")
            for depth in range(1, len(parts)):
                if depth == 1 or recursive:
                    folders.add("/".join(([folder] if folder else []) + parts[:depth]))
            if recursive or len(parts) == 1:
                rows.append(entry(name, file))
        if folder and not rows and not folders:
            return self.missing("EntryNotFound")
        self.reply(
            200,
            rows
            + [
                {"type": "directory", "oid": hashlib.sha1(d.encode()).hexdigest(), "size": 0, "path": d}
                for d in sorted(folders)
            ],
        )

    def resolve(self, kind, repo_id, revision, name):
        if self.hidden(kind, repo_id):
            return None
        sha = self.store.resolve(kind, repo_id, revision)
        if sha is None:
            return self.missing("RevisionNotFound")
        file = self.store.repo(kind, repo_id) / sha / name
        if not file.is_file():
            return self.reply(
                404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
            )
        row = entry(name, file)
        etag = row.get("lfs", row)["oid"]
        data = file.read_bytes()
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if (span := self.headers.get("Range")) and (m := re.fullmatch(r"bytes=(\d+)-(\d*)", span)):
            start, stop = int(m[1]), int(m[2]) + 1 if m[2] else len(data)
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
            code, data = 206, data[start:stop]
        else:
            code = 200
        if self.command == "GET" and (fault := self.store.fault("download", self.path)):
            self.close_connection = True
            self.send_response(code)
            for key, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data[: fault["bytes"]])
            if fault.get("hang"):
                self.wfile.flush()
                (self.store.root / "hanging").touch()
                threading.Event().wait()
            return None
        self.reply(code, data, headers, "application/octet-stream")

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        raw = self.body()
        if self.refused(write="paths-info" not in path):
            return None
        if path == "/api/repos/create":
            ask = json.loads(raw)
            kind = ask.get("type") or "model"
            name = ask["name"] if "/" in ask["name"] else f"{ask.get('organization') or 'tester'}/{ask['name']}"
            new = self.store.create(kind, name, ask.get("private") or ask.get("visibility") == "private")
            url = f"{self.base()}/{'' if kind == 'model' else kind + 's/'}{name}"
            return self.reply(200 if new else 409, {"url": url, "id": name, "name": name})
        if m := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)/(branch|tag)/(.+)", path):
            return self.make_ref(m[1], m[2], m[3], m[4], json.loads(raw or b"{}"))
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if m := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)/preupload/(.+)", path):
            return self.reply(
                200,
                {
                    "files": [
                        {
                            "path": f["path"],
                            "uploadMode": "lfs" if is_lfs(f["path"], f["size"]) else "regular",
                            "shouldIgnore": False,
                            "oid": None,
                        }
                        for f in json.loads(raw)["files"]
                    ]
                },
            )
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.reply(
                200,
                {
                    "transfer": "basic",
                    "objects": [
                        {"oid": o["oid"], "size": o["size"]}
                        | (
                            {}
                            if (self.store.root / "lfs" / o["oid"]).exists()
                            else {"actions": {"upload": {"href": f"{self.base()}/lfs/{o['oid']}", "header": {}}}}
                        )
                        for o in json.loads(raw)["objects"]
                    ],
                },
                ctype="application/vnd.git-lfs+json",
            )
        if m := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)/paths-info/(.+)", path):
            ask = parse_qs(raw.decode()) if not raw.lstrip().startswith(b"{") else json.loads(raw)
            wanted = ask.get("paths", [])
            wanted = [wanted] if isinstance(wanted, str) else wanted
            sha = self.store.resolve(m[1], m[2], m[3])
            files = self.store.files(m[1], m[2], sha) if sha else {}
            return self.reply(200, [entry(p, files[p]) for p in wanted if p in files])
        if m := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)/commit/(.+)", path):
            return self.commit(m[1], m[2], m[3], raw)
        return self.missing("EntryNotFound")

    def make_ref(self, kind, repo_id, what, name, ask):
        """A branch `name` from ask["startingPoint"], or a tag ask["tag"] at `name`."""
        with LOCK:
            if self.hidden(kind, repo_id):
                return None
            state = self.store.refs(kind, repo_id)
            refs, start = state["branches"], ask.get("startingPoint")
            if what == "tag":
                refs, name, start = state["tags"], ask["tag"], name
            if name in refs:
                return self.reply(409, {"error": f"Reference {name} already exists"})
            sha = self.store.resolve(kind, repo_id, start)
            if sha is None:
                return self.missing("RevisionNotFound")
            refs[name] = sha
            self.store.write(kind, repo_id, state)
            return self.reply(200, {})

    def commit(self, kind, repo_id, branch, raw):
        adds, deletes, title = {}, [], ""
        for line in raw.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value.get("summary", "")
            elif item["key"] == "file":
                content = value["content"]
                adds[value["path"]] = (
                    base64.b64decode(content) if value.get("encoding") == "base64" else content.encode()
                )
            elif item["key"] == "lfsFile":
                adds[value["path"]] = (self.store.root / "lfs" / value["oid"]).read_bytes()
            elif item["key"] in ("deletedFile", "deletedFolder"):
                deletes.append(value["path"])
        if self.hidden(kind, repo_id):
            return None
        if branch not in self.store.refs(kind, repo_id)["branches"]:
            return self.missing("RevisionNotFound")
        if self.store.fault("commit"):
            return self.reply(500, {"error": "Internal error"})
        create_pr = parse_qs(urlsplit(self.path).query).get("create_pr", ["0"])[0].lower() in ("1", "true")
        sha, number = self.store.commit(kind, repo_id, branch, adds, deletes, title, create_pr)
        prefix = "" if kind == "model" else kind + "s/"
        self.reply(
            200,
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{self.base()}/{prefix}{repo_id}/commit/{sha}",
                "pullRequestUrl": f"{self.base()}/{prefix}{repo_id}/discussions/{number}" if number else None,
                "hookOutput": "",
            },
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--port-file", type=Path)
    args = parser.parse_args()
    args.root.mkdir(parents=True, exist_ok=True)
    Handler.store = Store(args.root)
    server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    if args.port_file:
        args.port_file.write_text(str(server.server_address[1]))
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
