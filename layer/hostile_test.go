package layer_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hearth-serverless/hearth/layer"
)

// yard is a directory to unpack into, with files around it that must stay what they are.
type yard struct {
	into   string
	before map[string]string
	outer  string
}

func newYard(t testing.TB, where string) *yard {
	t.Helper()
	outer, err := os.MkdirTemp(where, "yard")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(outer) })
	y := &yard{into: filepath.Join(outer, "deep", "root"), outer: outer}
	if err := os.MkdirAll(y.into, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"canary", "deep/canary", "etc/passwd"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(outer, p)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(outer, p), []byte("canary"), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	y.before = y.around(t)
	return y
}

func (y *yard) around(t testing.TB) map[string]string {
	t.Helper()
	inside := filepath.Join(y.outer, "deep", "root")
	kept := filepath.Join(filepath.Dir(y.outer), "kept-"+filepath.Base(y.outer))
	if err := os.Rename(inside, kept); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := os.Rename(kept, inside); err != nil {
			t.Fatal(err)
		}
	}()
	return describe(t, y.outer, func(rel string) bool { return rel != "deep" })
}

// unharmed checks the files around.
func (y *yard) unharmed(t testing.TB) {
	t.Helper()
	after := y.around(t)
	if len(after) != len(y.before) {
		t.Errorf("files around the tree: before %v, after %v", y.before, after)
	}
	for p, want := range y.before {
		if after[p] != want {
			t.Errorf("%s outside of the tree changed from %s to %s", p, want, after[p])
		}
	}
}

func TestHostileEntriesAreRefused(t *testing.T) {
	nul := makeTar(t, ent{name: "nul-here", typ: tar.TypeReg})
	tests := map[string][]ent{
		"absolute name":                     {file("/etc/x", "x")},
		"absolute directory":                {dir("/etc", 0o755)},
		"climbing name":                     {file("../canary", "x")},
		"climbing in the middle":            {file("a/../../canary", "x")},
		"just up":                           {dir("..", 0o755)},
		"long name":                         {file(strings.Repeat("d/", 2100)+"f", "x")},
		"long component":                    {file(strings.Repeat("n", 300), "x")},
		"link climbs":                       {link("l", "../.."), file("l/canary", "x")},
		"link climbs from a directory":      {dir("a", 0o755), link("a/l", "../../.."), file("a/l/canary", "x")},
		"link climbs through another":       {dir("a", 0o755), link("a/l", ".."), link("a/m", "l/../../x"), file("a/m/y", "y"), link("n", "a/../../z"), file("n/y", "y")},
		"absolute link out of the tree":     {link("l", "/etc"), file("l/passwd", "x")},
		"absolute link to a file":           {file("f", "x"), link("l", "/f"), file("l/x", "x")},
		"absolute link, later made":         {link("l", "/later/on"), file("l/x", "x"), dir("later/on", 0o755)},
		"absolute link that climbs":         {link("l", "/../../../etc"), file("l/passwd", "x")},
		"relative link to an absolute one":  {link("a", "/nowhere"), link("b", "a/in"), file("b/x", "x")},
		"directory through escaping link":   {link("l", "../.."), dir("l/new", 0o755)},
		"link through escaping link":        {link("l", "../.."), link("l/new", "x")},
		"device through escaping link":      {link("l", "../.."), {name: "l/new", typ: tar.TypeFifo}},
		"white-out through escaping link":   {link("l", "../.."), file("l/.wh.canary", "")},
		"opaque through escaping link":      {link("l", "../.."), file("l/.wh..wh..opq", "")},
		"link loop":                         {link("a", "b"), link("b", "a"), file("a/x", "x")},
		"link to itself":                    {link("a", "a"), file("a/x", "x")},
		"growing link":                      {link("a", "a/a"), file("a/x", "x")},
		"hard link absolute":                {hard("h", "/etc/passwd")},
		"hard link climbs":                  {hard("h", "../canary")},
		"hard link climbs inside":           {dir("a", 0o755), hard("a/h", "a/../../canary")},
		"hard link to a directory":          {dir("d", 0o755), hard("h", "d")},
		"hard link to the root":             {hard("h", ".")},
		"hard link empty":                   {hard("h", "")},
		"hard link to itself":               {file("h", "x"), hard("h", "h")},
		"hard link through escaping link":   {link("l", "../.."), hard("h", "l/canary")},
		"hard link through an absolute one": {link("l", "/etc"), hard("h", "l/passwd")},
		"hard link through a file":          {file("f", "x"), hard("h", "f/x")},
		"file as directory":                 {file("f", "x"), file("f/x", "x")},
		"large file as directory":           {file("f", strings.Repeat("x", 3<<20)), file("f/x", "x")},
		"white-out of nothing":              {file(".wh.", "")},
		"white-out of dot":                  {file("a/.wh..", "")},
		"white-out of dot dot":              {file("a/.wh...", "")},
		"white-out of an entry":             {file("f", "x"), file(".wh.f", "")},
		"empty link":                        {link("l", "")},
		"link too long":                     {link("l", strings.Repeat("x", 5000))},
		"unknown type":                      {{name: "x", typ: '7'}},
		"negative owner":                    {{name: "x", uid: -1, format: tar.FormatGNU}},
		"huge owner":                        {{name: "x", gid: 1 << 33}},
		"short content":                     {{name: "x", data: "short", size: 4000}},
		"short large content":               {{name: "x", data: strings.Repeat("x", 2<<20), size: 1 << 40}},
		"bad capability":                    {{name: "x", xattrs: map[string]string{"security.capability": "nonsense"}}},
	}
	u := newUnpacker(t, layer.Config{})
	for name, ents := range tests {
		t.Run(name, func(t *testing.T) {
			refused(t, u, makeTar(t, ents...), ents[len(ents)-1].name)
		})
	}
	t.Run("name with a NUL", func(t *testing.T) {
		refused(t, u, bytes.Replace(nul, []byte("nul-here"), []byte("\x00ul-here"), 1), "")
	})
}

// refused unpacks a tar in every format, and checks that it is called corrupt by name and did no harm.
func refused(t *testing.T, u *layer.Unpacker, tarball []byte, entry string) {
	t.Helper()
	for _, format := range []layer.Format{layer.Tar, layer.Gzip} {
		for form, unpack := range forms {
			y := newYard(t, t.TempDir())
			blob := compress(t, format, tarball)
			spec := specOf(blob, tarball)
			_, err := unpack(u, t.Context(), bytes.NewReader(blob), spec, y.into)
			y.unharmed(t)
			var corrupt *layer.CorruptError
			if !errors.Is(err, layer.ErrCorrupt) || !errors.As(err, &corrupt) {
				t.Fatalf("%s, %s: got error %v, want a CorruptError", format, form, err)
			}
			if corrupt.Layer != spec.Digest || !strings.Contains(err.Error(), spec.Digest.String()) {
				t.Errorf("%s, %s: the error does not name the layer: %v", format, form, err)
			}
			if shown := entry[:min(len(entry), 64)]; !strings.Contains(err.Error(), shown) && !strings.Contains(err.Error(), "tar breaks") {
				t.Errorf("%s, %s: the error does not name the entry %q: %v", format, form, shown, err)
			}
		}
	}
}

func TestBombs(t *testing.T) {
	zeros := strings.Repeat("\x00", 130<<20)
	var many []ent
	for i := range 1200 {
		many = append(many, file(fmt.Sprintf("f%d", i), ""))
	}
	tests := map[string]struct {
		ents   []ent
		format layer.Format
		limits layer.Limits
		flag   string
	}{
		"ratio":             {[]ent{file("zeros", zeros)}, layer.Gzip, layer.Limits{}, "--layer-max-ratio"},
		"ratio, zstd":       {[]ent{file("zeros", zeros)}, layer.Zstd, layer.Limits{}, "--layer-max-ratio"},
		"bytes":             {[]ent{file("some", strings.Repeat("ab", 3<<20))}, layer.Gzip, layer.Limits{MaxBytes: 1 << 20}, "--layer-max-bytes"},
		"bytes, plain":      {[]ent{file("some", strings.Repeat("ab", 3<<20))}, layer.Tar, layer.Limits{MaxBytes: 1 << 20}, "--layer-max-bytes"},
		"entries":           {many, layer.Gzip, layer.Limits{MaxEntries: 1000}, "--layer-max-entries"},
		"directories' text": {manyDirs(20000), layer.Gzip, layer.Limits{MaxEntries: 21000}, "--layer-max-entries"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			tarball := makeTar(t, tt.ents...)
			blob := compress(t, tt.format, tarball)
			for form, unpack := range forms {
				_, err := unpack(newUnpacker(t, layer.Config{Limits: tt.limits}), t.Context(), bytes.NewReader(blob), specOf(blob, tarball), shm(t))
				if !errors.Is(err, layer.ErrCorrupt) || !strings.Contains(err.Error(), tt.flag) {
					t.Fatalf("%s: got error %v, want one that is corrupt and names %s", form, err, tt.flag)
				}
			}
		})
	}
	t.Run("sparse file", func(t *testing.T) {
		for _, size := range []int64{20 << 30, 1 << 62} {
			tarball := sparseTar(t, size)
			blob := compress(t, layer.Gzip, tarball)
			for form, unpack := range forms {
				_, err := unpack(newUnpacker(t, layer.Config{}), t.Context(), bytes.NewReader(blob), specOf(blob, tarball), shm(t))
				if !errors.Is(err, layer.ErrCorrupt) || !strings.Contains(err.Error(), "--layer-max-") {
					t.Fatalf("%s: got error %v, want one that names the flag", form, err)
				}
			}
		}
	})
}

func manyDirs(n int) (ents []ent) {
	for i := range n {
		ents = append(ents, dir(fmt.Sprintf("directory-%d", i), 0o755))
	}
	return ents
}

// sparseTar has one file in GNU's PAX sparse format 1.0 whose content is "data" at 4096, in a file of the given size.
func sparseTar(t testing.TB, size int64) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	sparseMap := fmt.Sprintf("1\n4096\n4\n")
	content := sparseMap + strings.Repeat("\x00", 512-len(sparseMap)) + "data"
	// archive/tar writes no sparse files: put the records into an extended header of our own.
	records := ""
	for _, kv := range [][2]string{
		{"GNU.sparse.major", "1"}, {"GNU.sparse.minor", "0"}, {"GNU.sparse.name", "dir/holes"}, {"GNU.sparse.realsize", fmt.Sprint(size)},
	} {
		n := len(kv[0]) + len(kv[1]) + 3
		for total := n + len(fmt.Sprint(n)); ; total++ {
			if rec := fmt.Sprintf("%d %s=%s\n", total, kv[0], kv[1]); len(rec) == total {
				records += rec
				break
			}
		}
	}
	if err := w.WriteHeader(&tar.Header{Name: "x", Typeflag: tar.TypeReg, Size: int64(len(records)), Format: tar.FormatUSTAR}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte(records)); err != nil {
		t.Fatal(err)
	}
	if err := w.WriteHeader(&tar.Header{Name: "y", Typeflag: tar.TypeReg, Mode: 0o640, Size: int64(len(content)), ModTime: epoch.Truncate(1e9), Format: tar.FormatUSTAR}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte(content)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	b := buf.Bytes()
	// Make the first header an extended one, with its checksum.
	b[156] = 'x'
	copy(b[148:156], "        ")
	sum := 0
	for _, c := range b[:512] {
		sum += int(c)
	}
	copy(b[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

func TestSparseFile(t *testing.T) {
	into := t.TempDir()
	const size = 3<<20 + 17
	if _, err := unpackTar(t, sparseTar(t, size), into); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(into, "dir/holes"))
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, size)
	copy(want[4096:], "data")
	if !bytes.Equal(got, want) {
		t.Errorf("content of %d bytes differs", len(got))
	}
}
