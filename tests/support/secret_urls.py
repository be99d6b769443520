"""URLs whose secrets are hard to cut out: quoted, escaped, split and misplaced in every way that was thought of."""

from __future__ import annotations

from urllib.parse import quote


def secret_urls(host: str, secret: str) -> dict[str, str]:
    """Return URLs on a host, by what is odd about them; each has the secret where it must not be seen."""
    path = f"http://{host}/trap"
    signed = f"X-Amz-Signature={secret}"
    return {
        "apostrophe in the path": f"{path}/o'hara.jpg?{signed}",
        "apostrophes in the query": f"{path}/a.jpg?name='x'&{signed}",
        "apostrophe at the secret": f"{path}/a.jpg?{signed}'&x=1",
        "double quotes": f'{path}/a"b".jpg?disposition="c.jpg"&{signed}',
        "both quotes": f"""{path}/a'b".jpg?d='"c"'&{signed}""",
        "spaces": f"{path} 1/my image.jpg?name=my image.jpg&{signed}",
        "a header's value": f'{path}/a.jpg?disposition=attachment; filename="c.jpg"&{signed}',
        "backslashes": f"{path}\\1\\a.jpg?d=\\'c\\'&{signed}",
        "angle brackets": f"{path}/<a>.jpg?d=<c>&{signed}",
        "brackets": f"{path}/(a)[1].jpg?d=[c]&({signed})",
        "umlauts": f"{path}/späher.jpg?straße=größe&{signed}",
        "beyond the first plane": f"{path}/\N{BUTTERFLY}.jpg?q=\N{BUTTERFLY}&{signed}",
        "line ends": f"{path}/a\n.jpg?x=1\r\n&{signed}",
        "a line end in the secret's way": f"{path}/a.jpg?X-Amz-\nSignature={secret}",
        "percent-encoded question mark": f"{path}/a.jpg%3F{quote(signed, safe='')}",
        "percent-encoded twice": f"{path}/a.jpg%253F{signed}",
        "percent-encoded query": f"{path}/a.jpg?{quote(f'name=x&{signed}', safe='')}",
        "another URL in the query": f"{path}/a.jpg?src={quote(f'http://{host}/b.jpg?{signed}', safe='')}",
        "fragment": f"{path}/a.jpg#{secret}",
        "fragment before the query": f"{path}/a.jpg#b?{signed}",
        "password": f"http://user:{secret}@{host}/a.jpg",
        "password with an apostrophe": f"http://user:it's-{secret}@{host}/a.jpg",
        "password with an at sign": f"http://user:p@{secret}@{host}/a.jpg",
        "password with a colon": f"http://user:p:{secret}@{host}/a.jpg",
        "password with a slash": f"http://user:pa/{secret}@{host}/a.jpg",
        "user without password": f"http://{secret}@{host}/a.jpg",
        "impossible port": f"http://images.example.org:8o/a 'b'.jpg?{signed}",
        "port beyond all ports": f"http://images.example.org:99999/a.jpg?name='x'&{signed}",
        "unclosed address": f"http://[::1/my 'image'.jpg?{signed}",
        "another scheme": f"ftp://{host}/a 'b'.jpg?{signed}",
        "no scheme": f"//{host}/a 'b'.jpg?{signed}",
        "very long": f"{path}/{'a' * 5000}.jpg?b={'c' * 5000}&{signed}",
        "many parameters": f"{path}/a.jpg?{'&'.join(f'p{number}=v' for number in range(300))}&{signed}",
    }
