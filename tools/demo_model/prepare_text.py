#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Turns unpacked Debian packages into clean text, one pair of files per kind of text.

    prepare_text.py DIR [KIND...]       reads DIR/x (see fetch_packages.sh) and writes
                                        DIR/txt/KIND.train and KIND.val

Documents are separated by a line holding one NUL. Cleaning: licence headers, page headers and
footers, generated tables and English left over in translations are dropped; a long paragraph is
kept only where it is seen first within its kind, so the held-out documents (chosen by a hash of
their name) repeat nothing of the training ones.
"""
import glob
import gzip
import hashlib
import html.parser
import multiprocessing
import os
import re
import subprocess
import sys

SEPARATOR = "\n\x00\n"
HELD_OUT_ONE_IN = 40
HELD_OUT_ONE_IN_SMALL = 15  # kinds of fewer than 1500 documents
PARAGRAPH_MIN = 100  # shorter paragraphs may repeat: headings, closing braces
PAGE_MAX = 100_000  # characters kept of one man page
HERE = os.path.dirname(os.path.abspath(__file__))


def read_text(path):
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rb") as f:
        data = f.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def name_hash(name):
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


def package_list():
    """{kind: [package]} from packages.txt, without the marks of the withheld kinds."""
    kinds = {}
    for line in open(os.path.join(HERE, "packages.txt")):
        words = line.split("#")[0].split()
        if words:
            kinds.setdefault(words[0].lstrip("-"), []).extend(words[1:])
    return kinds


def withheld_kinds():
    lines = open(os.path.join(HERE, "packages.txt")).read().split("\n")
    return sorted({line.split()[0][1:] for line in lines if line.startswith("-")})


# ---------------------------------------------------------------- source code

LICENCE = re.compile(r"copyright|licen[cs]e|SPDX|warranty|all rights reserved", re.I)


def strip_c_header(text):
    """Drops the comments and #-free blank lines before the code if they speak of licences."""
    while True:
        text = text.lstrip()
        if text.startswith("//"):
            head, _, rest = text.partition("\n")
        elif text.startswith("/*"):
            head, _, rest = text.partition("*/")
        else:
            return text
        if not LICENCE.search(head) and not head.startswith("//"):
            return text
        text = rest


def is_table(text):
    """Register lists and data tables: many digits, or nearly nothing but #define."""
    lines = text.split("\n")
    digits = sum(c.isdigit() for c in text) / max(1, len(text))
    defines = sum(line.startswith("#define") for line in lines) / len(lines)
    return digits > 0.08 or defines > 0.5 or len(text) / len(lines) > 120


def c_documents(root):
    core = ("kernel", "mm", "fs", "lib", "net", "block", "crypto", "io_uring", "ipc", "init",
            "security", "virt", "include/linux", "include/net", "arch/x86", "arch/arm64",
            "arch/riscv", "sound/core", "tools/perf", "tools/lib", "samples", "drivers/base",
            "drivers/pci", "drivers/usb", "drivers/tty", "drivers/block", "drivers/md")
    base = os.path.join(root, "linux")
    paths = sorted(glob.glob(base + "/**/*.[ch]", recursive=True))
    names = [(os.path.relpath(p, base), p) for p in paths]
    names = [(n, p) for n, p in names if 1500 < os.path.getsize(p) < 120_000
             and "asic_reg" not in n and "/test_" not in n and not n.endswith("_reg.h")]
    names.sort(key=lambda np: (not np[0].startswith(core), name_hash(np[0])))
    total = 0
    for name, path in names:
        text = strip_c_header(read_text(path))
        if len(text) > 1000 and not is_table(text):
            total += len(text)
            yield name, text
        if total > 95e6:
            return


def python_documents(root, packages):
    for package in packages:
        for path in sorted(glob.glob(f"{root}/{package}/**/*.py", recursive=True)):
            if os.path.islink(path) or re.search(
                    r"/tests?/|/test_|/conf/locale|lib2to3|idlelib/", path):
                continue
            lines = read_text(path).split("\n")
            while lines and (lines[0].startswith("#") or not lines[0].strip()):
                lines.pop(0)
            text = "\n".join(lines)
            if 800 < len(text) < 100_000 and not is_table(text):
                yield path[len(root):], text


def elisp_documents(root, packages):
    paths = glob.glob(f"{root}/{packages[0]}/**/*.el.gz", recursive=True)
    for path in sorted(paths):
        if re.search(r"/leim/|/international/|loaddefs|-tests?\.el|/cedet/.*-wy", path):
            continue
        text = read_text(path)
        cut = re.search(r"^;;; (Commentary|Code):", text, re.M)
        text = text[cut.start():] if cut else text
        if 800 < len(text) < 200_000 and not is_table(text):
            yield path[len(root):], text


# ---------------------------------------------------------------- man pages

def render_man(path):
    """A page as text, without its header and footer lines; '' if it is only a link."""
    source = read_text(path)
    if len(source) < 600 or source.lstrip().startswith(".so "):
        return ""
    page = subprocess.run(["mandoc", "-Tutf8", "-O", "width=84"], input=source.encode(),
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
    page = re.sub(".\b", "", page.decode("utf-8", "replace"))
    lines = [line.rstrip() for line in page.split("\n")]
    lines = lines[1:]
    while lines and not lines[-1]:
        lines.pop()
    lines = lines[:-1]
    text = "\n".join(lines).strip("\n").replace("\u2010", "-").replace("\xa0", " ")
    return re.sub(r"\n{3,}", "\n\n", text)


def man_documents(root, packages, language):
    paths = []
    for package in packages:
        paths += glob.glob(f"{root}/{package}/usr/share/man/{language}/man?/*.gz" if language
                           else f"{root}/{package}/usr/share/man/man?/*.gz")
    paths = sorted(set(p for p in paths if not os.path.islink(p)))
    with multiprocessing.Pool(2) as pool:
        pages = pool.map(render_man, paths, chunksize=16)
    for path, page in zip(paths, pages):
        if len(page) > 400:
            yield os.path.basename(path), page[:PAGE_MAX].rpartition("\n\n")[0] or page


ENGLISH = re.compile(r"\b(the|of|and|to|is|are|this|that|with|for|be|by)\b")


def is_english(paragraph):
    words = len(paragraph.split())
    return words >= 8 and len(ENGLISH.findall(paragraph)) > 0.2 * words


# ---------------------------------------------------------------- manuals

class HtmlText(html.parser.HTMLParser):
    """HTML to plain text: blocks become paragraphs, <pre> keeps its lines."""
    BLOCK = set("p div h1 h2 h3 h4 h5 h6 ul ol dl dt dd tr table section pre blockquote".split())
    SKIP = set("script style head nav footer header noscript".split())
    VOID_SKIP = re.compile(r"nav|toc|footer|header|menu|sphinxsidebar|related|index")

    def __init__(self):
        super().__init__()
        self.out, self.skip, self.pre = [], 0, 0

    def handle_starttag(self, tag, attrs):
        if tag in self.SKIP:
            self.skip += 1
        if tag == "pre":
            self.pre += 1
        if tag in self.BLOCK:
            self.out.append("\n\n" if tag != "tr" else "\n")
        elif tag == "br":
            self.out.append("\n")
        elif tag == "li":
            self.out.append("\n- ")
        elif tag in ("td", "th"):
            self.out.append(" ")

    def handle_endtag(self, tag):
        if tag in self.SKIP:
            self.skip = max(0, self.skip - 1)
        if tag == "pre":
            self.pre = max(0, self.pre - 1)
        if tag in self.BLOCK:
            self.out.append("\n\n" if tag != "tr" else "\n")

    def handle_data(self, data):
        if not self.skip:
            self.out.append(data if self.pre else re.sub(r"\s+", " ", data))


def html_to_text(source):
    parser = HtmlText()
    parser.feed(source)
    text = "".join(parser.out).replace("\xa0", " ").replace("\u00b6", "")
    lines = [line.rstrip() for line in text.split("\n")]
    lines = [line[1:] if line.startswith(" ") and not line.startswith("  ") else line
             for line in lines]
    text = "\n".join(lines)
    text = re.sub(r"\n- *\n+", "\n- ", text)
    text = re.sub(r"^(Prev|Next|Home|Up)\b.*$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


OTHER_LANGUAGE = re.compile(r"/(?!en/|en-US/)(?:[a-z]{2}|[a-z]{2}-[A-Za-z]{2}|zh-[a-z]+|pt-br)/"
                            r"|\.(de|fr|es|it|ja|pl|pt-br|ru|zh-cn|zh-tw|nl|ca|cs|da|tr|ko)\.html")


def manual_documents(root, packages):
    for package in packages:
        base = f"{root}/{package}/usr/share/"
        if package == "perl-doc":
            for path in sorted(glob.glob(base + "perl/*/pod/*.pod")):
                if not re.search("delta|perltoc|perluniprops|perlapi|perlmodlib", path):
                    run = subprocess.run(["pod2text", path], stdout=subprocess.PIPE)
                    yield path[len(root):], run.stdout.decode("utf-8", "replace")
            continue
        if package == "python3.11-doc":
            for path in sorted(glob.glob(base + "doc/**/_sources/**/*.txt", recursive=True)):
                yield path[len(root):], read_text(path)
            continue
        paths = glob.glob(base + "**/*.htm*", recursive=True)
        for path in sorted(p for p in paths if os.path.isfile(p) and not os.path.islink(p)):
            name = path[len(root):]
            inside = name.split("usr/share/")[1]
            if package == "rust-doc" and not re.search(
                    r"html/(book|reference|rust-by-example|nomicon|cargo|rustc|embedded-book|"
                    r"edition-guide|unstable-book|rustdoc)/", inside):
                continue
            if OTHER_LANGUAGE.search(inside) or re.search(r"print\.html|genindex|theindex", inside):
                continue
            yield name, html_to_text(read_text(path))


def kernel_documents(root):
    base = root + "/linux-doc-6.1/usr/share/doc/linux-doc-6.1/"
    paths = glob.glob(base + "html/_sources/**/*.txt", recursive=True)
    paths += glob.glob(base + "Documentation/**/*.txt.gz", recursive=True)
    for path in sorted(paths):
        if re.search(r"translations|devicetree|features/", path):
            continue
        lines = read_text(path).split("\n")
        while lines and (not lines[0].strip() or re.match(r"\.\. (SPDX|include|_)", lines[0])):
            lines.pop(0)
        text = "\n".join(line.rstrip() for line in lines)
        if len(text) > 500:
            yield path[len(base):], text


# ---------------------------------------------------------------- books and dictionaries

def dictd_entries(path):
    """Entries of a dictd file: an entry starts at column 0 after an empty line."""
    entry = []
    previous_blank = True
    for line in read_text(path).split("\n"):
        if line[:1].strip() and previous_blank and entry:
            yield "\n".join(entry).strip()
            entry = []
        entry.append(line.rstrip())
        previous_blank = not line.strip()
    yield "\n".join(entry).strip()


def gcide_documents(root):
    path = root + "/dict-gcide/usr/share/dictd/gcide.dict.dz"
    with gzip.open(path) as f:
        text = f.read().decode("utf-8", "replace")
    tag = re.compile(r"^ *\[(1913 Webster|Webster 1913 Suppl\.|PJC|WordNet 1\.5|[^\]\n]{0,24}PJC)"
                     r"[^\]\n]{0,20}\]\n", re.M)
    for number, entry in enumerate(re.split(r"\n\n(?=\S)", tag.sub("", text))):
        entry = re.sub(r"\n{3,}", "\n\n", entry).strip()
        if "\\" in entry[:120] and len(entry) > 80 and "database" not in entry[:80]:
            yield f"gcide-{number}", entry


def saying_documents(root, packages):
    for package in packages:
        for path in sorted(glob.glob(f"{root}/{package}/usr/share/games/fortunes/*")):
            name = os.path.basename(path)
            if "." in name or name in ("ethnic", "men-women", "drugs", "ascii-art", "art"):
                continue
            for number, text in enumerate(re.split(r"\n%\n", read_text(path))):
                yield f"{name}-{number}", text.replace("\t", "    ").strip("\n")
        for path in sorted(glob.glob(f"{root}/{package}/usr/share/dictd/*.dict.dz")):
            data = gzip.open(path).read().decode("utf-8", "replace")
            for number, entry in enumerate(re.split(r"\n\n+(?=[A-Za-z])", data)):
                yield f"{package}-{number}", re.sub(r"\n{3,}", "\n\n", entry).strip()


def kjv_documents(root):
    command = ["bible-kjv/usr/bin/bible", "-l250", "-d", "bible-kjv-text/usr/lib/bible.data",
               "gen1:1-rev22:21"]
    run = subprocess.run(command, cwd=root, stdout=subprocess.PIPE)
    text = run.stdout.decode("latin-1")
    chapter, lines = None, []
    for line in text.split("\n"):
        if re.match(r"^(\d )?[A-Z][A-Za-z ]+ \d+$", line):
            if chapter:
                yield chapter, chapter + "\n\n" + "\n".join(lines)
            chapter, lines = line, []
        elif re.match(r"^ +\d+ ", line):
            lines.append(line.strip())
        elif line.strip() and lines:
            lines[-1] += " " + line.strip()
    yield chapter, chapter + "\n\n" + "\n".join(lines)


# ---------------------------------------------------------------- all kinds

def documents(kind, root, packages):
    if kind == "c":
        return c_documents(root)
    if kind == "kernel-doc":
        return kernel_documents(root)
    if kind.startswith("man-"):
        language = kind[4:]
        return man_documents(root, packages, "" if language == "en" else language)
    if kind == "manuals":
        return manual_documents(root, packages)
    if kind == "python":
        return python_documents(root, packages)
    if kind == "elisp":
        return elisp_documents(root, packages)
    if kind == "gcide":
        return gcide_documents(root)
    if kind == "kjv":
        return kjv_documents(root)
    return saying_documents(root, packages)


def clean(kind, docs):
    """Yields (name, text) without repeated paragraphs, repeated documents and stray English."""
    seen = set()
    translated = kind.startswith("man-") and kind != "man-en"
    for name, text in docs:
        kept = []
        for paragraph in re.split(r"\n\n+", text.replace("\r", "").replace("\x00", "")):
            if translated and is_english(paragraph):
                continue
            if len(paragraph) >= PARAGRAPH_MIN or len(text) < 1500:
                key = hashlib.blake2b(re.sub(r"\W+", "", paragraph).encode(), digest_size=12)
                if key.digest() in seen:
                    continue
                seen.add(key.digest())
            kept.append(paragraph)
        text = "\n\n".join(kept)
        if len(text) > (40 if kind in ("sayings", "gcide") else 300):
            yield name, text


def main():
    root = sys.argv[1] + "/x"
    os.makedirs(sys.argv[1] + "/txt", exist_ok=True)
    wanted = sys.argv[2:]
    for kind, packages in package_list().items():
        if wanted and kind not in wanted:
            continue
        parts = {"train": [], "val": []}
        cleaned = list(clean(kind, documents(kind, root, packages)))
        one_in = HELD_OUT_ONE_IN if len(cleaned) >= 1500 else HELD_OUT_ONE_IN_SMALL
        for name, text in cleaned:
            part = "val" if name_hash(kind + name) % one_in == 0 else "train"
            parts[part].append((name_hash(name), text))
        for part, docs in parts.items():
            docs.sort(key=lambda d: d[0])
            with open(f"{sys.argv[1]}/txt/{kind}.{part}", "w") as f:
                f.write(SEPARATOR.join(text for _, text in docs))
            print(kind, part, len(docs), "documents", sum(len(t.encode()) for _, t in docs),
                  "bytes", flush=True)


if __name__ == "__main__":
    main()
