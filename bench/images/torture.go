package images

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"strings"
	"time"
)

// torture is three small layers of everything that a layer may say and that is easily got wrong. Every folder is written before
// what is in it, in every layer, because folders that a layer leaves out get the time at which they were made. See the entries.
func (s *shape) torture() error {
	err := s.pack(func(w io.Writer) error {
		if err := sparseFile(w); err != nil {
			return err
		}
		out := tar.NewWriter(w)
		if err := s.function(out); err != nil {
			return err
		}
		if err := writeEntries(out, tortureBase()); err != nil {
			return err
		}
		return out.Close()
	})
	if err != nil {
		return err
	}
	for _, entries := range [][]odd{tortureChanges(), tortureReturns()} {
		if err := s.add(func(out *tar.Writer) error { return writeEntries(out, entries) }); err != nil {
			return err
		}
	}
	return nil
}

// odd is an entry with what is not as usual about it.
type odd struct {
	tar.Header
	text string
}

func writeEntries(out *tar.Writer, entries []odd) error {
	for _, e := range entries {
		h := e.Header
		h.Size = int64(len(e.text))
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if h.ModTime.IsZero() {
			h.ModTime = shapeTime()
		}
		h.Format = tar.FormatPAX
		if err := put(out, &h, strings.NewReader(e.text)); err != nil {
			return err
		}
	}
	return nil
}

func folder(name string) odd {
	return odd{Header: tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755}}
}

func regular(name, text string) odd {
	return odd{Header: tar.Header{Typeflag: tar.TypeReg, Name: name}, text: text}
}

func linked(kind byte, name, target string) odd {
	return odd{Header: tar.Header{Typeflag: kind, Name: name, Linkname: target}}
}

func device(kind byte, name string, major, minor int64) odd {
	return odd{Header: tar.Header{Typeflag: kind, Name: name, Devmajor: major, Devminor: minor, Mode: 0o620}}
}

// at, owned and with change one thing.
func (e odd) at(t time.Time) odd { e.ModTime = t; return e }

func (e odd) owned(uid, gid int, mode int64) odd {
	e.Uid, e.Gid, e.Mode = uid, gid, mode
	return e
}

func (e odd) with(attribute, value string) odd {
	e.PAXRecords = map[string]string{"SCHILY.xattr." + attribute: value}
	return e
}

// tortureBase is the lowest layer.
func tortureBase() []odd {
	long, deep := strings.Repeat("n", 255), "names/"+strings.Repeat("deep/", 60)
	entries := []odd{
		folder("names"),
		regular("names/"+long, "longest name"),
		regular("names/ space \t\"quote\" \\back\\ 'and' $HOME", "odd name"),
		regular("names/new\nline", "a line break"),
		regular("names/ünïcödé-日本語-🔥", "not ASCII"),
		regular("names/.wh", "not quite a whiteout"),
		linked(tar.TypeSymlink, "names/far", strings.Repeat("a/very/long/target/", 100)),
	}
	for at := range deep {
		if deep[at] == '/' && at > len("names") {
			entries = append(entries, folder(deep[:at]))
		}
	}
	return append(entries,
		regular(deep+"file", "below sixty folders"),

		folder("links"), folder("links/other"),
		regular("links/first", "one file with four names"),
		linked(tar.TypeLink, "links/second", "links/first"),
		linked(tar.TypeLink, "links/other/third", "links/first"),
		linked(tar.TypeLink, "fourth", "links/other/third"),
		linked(tar.TypeSymlink, "links/symbolic", "first"),
		linked(tar.TypeLink, "links/symbolic-too", "links/symbolic"),
		linked(tar.TypeSymlink, "links/nowhere", "/does/not/exist"),
		linked(tar.TypeSymlink, "links/loop", "loop"),

		folder("attributes").with("user.folder", "of a folder"),
		regular("attributes/user", "x").with("user.comment", "text"),
		regular("attributes/binary", "x").with("user.binary", "\x01\xff\x02"),
		regular("attributes/capability", "x").owned(0, 0, 0o755).with("security.capability", "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"),

		folder("modes").owned(0, 0, 0o1777),
		regular("modes/setuid", "x").owned(0, 0, 0o4755),
		regular("modes/setgid", "x").owned(1, 50, 0o2755),
		regular("modes/none", "x").owned(0, 0, 0o1000),
		regular("modes/owner", "x").owned(3_000_000_000, 4_000_000_000, 0o600),
		folder("modes/private").owned(1000, 1000, 0o700),

		folder("devices"),
		device(tar.TypeChar, "devices/null", 1, 3),
		device(tar.TypeBlock, "devices/block", 7, 200),
		device(tar.TypeFifo, "devices/pipe", 0, 0),

		folder("times").at(time.Unix(1, 0)),
		regular("times/epoch", "x").at(time.Unix(0, 1)),
		regular("times/before", "x").at(time.Unix(-1_000_000, 500_000_000)),
		regular("times/far", "x").at(time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC)),
		regular("times/fine", "x").at(time.Unix(1_700_000_000, 123_456_789)),

		folder("changes"), folder("changes/gone"), folder("changes/opaque"), folder("changes/opaque/inner"),
		folder("changes/late"), folder("changes/folder"),
		regular("changes/file", "to be gone"),
		regular("changes/gone/file", "to be gone with its folder"),
		regular("changes/opaque/file", "to be hidden"),
		regular("changes/opaque/inner/file", "to be hidden too"),
		regular("changes/late/file", "to be hidden by a mark that comes last"),
		regular("changes/folder/file", "its folder becomes a file"),
		regular("changes/becomes-folder", "becomes a folder"),
		linked(tar.TypeSymlink, "changes/becomes-real", "folder"),
		regular("changes/touched", "only its mode changes"),
		regular("changes/back", "goes and comes back"),
		regular("twice", "the first of two"),
		regular("twice", "the second of two, which counts"),
		regular("empty", ""),
	)
}

// tortureChanges is what the second layer does to the first.
func tortureChanges() []odd {
	whiteout := func(dir, name string) odd { return regular(dir+whiteoutPrefix+name, "") }
	return []odd{
		folder("changes"),
		whiteout("changes/", "file"),
		whiteout("changes/", "gone"),
		whiteout("changes/", "back"),
		whiteout("changes/", "never-was"),
		folder("changes/opaque").owned(7, 7, 0o711),
		regular("changes/opaque/"+opaqueMarker, ""),
		folder("changes/opaque/inner"),
		regular("changes/opaque/inner/new", "all that is left"),
		folder("changes/late"),
		regular("changes/late/new", "before the mark"),
		regular("changes/late/"+opaqueMarker, ""),
		regular("changes/folder", "was a folder"),
		folder("changes/becomes-folder"),
		regular("changes/becomes-folder/file", "in what was a file"),
		folder("changes/becomes-real"),
		regular("changes/becomes-real/file", "in what was a link"),
		regular("changes/touched", "only its mode changes").owned(0, 0, 0o600),
		folder("links"), folder("links/other"),
		// A hard link over layers: the file is written again with the names that it has from here on.
		regular("links/first", "one file with three names, of another layer"),
		linked(tar.TypeLink, "links/second", "links/first"),
		linked(tar.TypeLink, "links/other/fifth", "links/first"),
	}
}

// tortureReturns is the third layer.
func tortureReturns() []odd {
	return []odd{
		folder("changes"),
		regular("changes/back", "is back"),
		folder("changes/gone").owned(9, 9, 0o750),
		regular("changes/gone/file", "another, in a folder of the old name"),
		folder("links"),
		linked(tar.TypeSymlink, "links/second", "other/fifth"),
	}
}

// sparseFile writes a file that is mostly a hole, in GNU tar's format 1.0, which archive/tar reads but does not write: records of
// an extended header say so, and the content begins with a map of what is there, by offset and length.
func sparseFile(w io.Writer) error {
	const size, hole = 64 << 20, 48 << 20
	data := bytes.Repeat([]byte("data"), 1024)
	var records strings.Builder
	for _, r := range []string{"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=sparse", fmt.Sprintf("GNU.sparse.realsize=%d", size)} {
		record := fmt.Sprintf("%d %s\n", len("00 \n")+len(r), r) // none is so long or short that its length has not two digits
		records.WriteString(record)
	}
	pieces := fmt.Sprintf("3\n0\n%d\n%d\n%d\n%d\n0\n", len(data), hole, len(data), size)
	content := append(append(padded([]byte(pieces)), data...), data...)
	for _, part := range [][]byte{
		rawHeader("PaxHeaders/sparse", tar.TypeXHeader, records.Len()), padded([]byte(records.String())),
		rawHeader("GNUSparseFile/sparse", tar.TypeReg, len(content)), content,
	} {
		if _, err := w.Write(part); err != nil {
			return err
		}
	}
	return nil
}

// tarBlock is what all parts of a tar are padded to.
const tarBlock = 512

func padded(data []byte) []byte {
	return append(data, make([]byte, (tarBlock-len(data)%tarBlock)%tarBlock)...)
}

// rawHeader is a header in POSIX's form.
func rawHeader(name string, kind byte, size int) []byte {
	h := make([]byte, tarBlock)
	octal := func(at, digits int, value int64) { copy(h[at:], fmt.Sprintf("%0*o\x00", digits, value)) }
	copy(h, name)
	octal(100, 7, 0o644)
	octal(108, 7, 0)
	octal(116, 7, 0)
	octal(124, 11, int64(size))
	octal(136, 11, shapeTime().Unix())
	copy(h[148:], "        ") // counted as spaces in the sum that takes its place
	h[156] = kind
	copy(h[257:], "ustar\x0000")
	sum := int64(0)
	for _, c := range h {
		sum += int64(c)
	}
	octal(148, 6, sum)
	return h
}
