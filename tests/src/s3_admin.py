"""Makes signed requests of S3, one a line of standard input: METHOD PATH QUERY FILE, with `-` for none."""

import datetime
import hashlib
import hmac
import http.client
import sys


def ask(host, key, secret, method, path, query, body):
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    digest = hashlib.sha256(body).hexdigest()
    names = "host;x-amz-content-sha256;x-amz-date"
    heads = f"host:{host}\nx-amz-content-sha256:{digest}\nx-amz-date:{now}\n"
    canonical = "\n".join([method, path, query, heads, names, digest])
    scope = f"{now[:8]}/us-east-1/s3/aws4_request"
    text = "\n".join(["AWS4-HMAC-SHA256", now, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    sign = ("AWS4" + secret).encode()
    for part in (now[:8], "us-east-1", "s3", "aws4_request", text):
        sign = hmac.new(sign, part.encode(), hashlib.sha256).digest()
    head = f"AWS4-HMAC-SHA256 Credential={key}/{scope}, SignedHeaders={names}, Signature={sign.hex()}"
    connection = http.client.HTTPConnection(host, timeout=30)
    headers = {"x-amz-date": now, "x-amz-content-sha256": digest, "Authorization": head}
    connection.request(method, path + ("?" + query if query else ""), body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


for line in sys.stdin:
    method, path, query, file = line.split()
    body = b"" if file == "-" else open(file, "rb").read()
    status, answer = ask(*sys.argv[1:4], method, path, "" if query == "-" else query, body)
    if status >= 300:
        sys.exit(f"{line.strip()}: {status} {answer.decode()}")
