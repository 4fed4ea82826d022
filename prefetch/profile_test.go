package prefetch_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/hearth-serverless/hearth/prefetch"
)

var (
	base = digest.FromString("base")
	app  = digest.FromString("app")
)

func example() *prefetch.Profile {
	return &prefetch.Profile{Starts: 3, Weight: 2.44, Lost: 7, Files: []prefetch.File{
		{Layer: base, Path: "usr/bin/python3", Ranges: []prefetch.Range{
			{Offset: 0, Length: 8192, Order: 0, Seen: 2.44}, {Offset: 40960, Length: 4096, Order: 2, Seen: 1.22, AfterReady: true},
		}},
		{Layer: app, Path: "app/späß.py", Ranges: []prefetch.Range{{Offset: 0, Length: 4096, Order: 1, Seen: 2.44}}},
	}}
}

// nearly is what hundredths keep of a weight.
var nearly = cmpopts.EquateApprox(0.01, 0.01)

func TestEncode(t *testing.T) {
	encoded, err := example().Encode()
	if err != nil {
		t.Fatal(err)
	}
	p, err := prefetch.Parse(encoded)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(example(), p, nearly); diff != "" {
		t.Error(diff)
	}
	if got := p.Bytes(); got != 16384 {
		t.Errorf("%d bytes", got)
	}
}

// large is a profile with more than can be kept; what is worth most has odd numbers.
func large(files int) *prefetch.Profile {
	p := &prefetch.Profile{Starts: 3, Weight: 2.44}
	random := rand.New(rand.NewPCG(1, 2))
	for i := range files {
		seen := 2.44
		if i%2 == 0 {
			seen = 0.64
		}
		f := prefetch.File{Layer: base, Path: fmt.Sprintf("lib/%x/module-%d.py", random.Uint64(), i)}
		for at := range int64(3) {
			f.Ranges = append(f.Ranges, prefetch.Range{
				Offset: (at*1000 + random.Int64N(900)) * 4096, Length: 4096 * (1 + random.Int64N(50)), Order: 3*i + int(at), Seen: seen,
			})
		}
		p.Files = append(p.Files, f)
	}
	return p
}

func TestEncodeKeepsWhatIsWorthMost(t *testing.T) {
	p := large(9000)
	encoded, err := p.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if len(encoded) > prefetch.MaxEncoded || len(encoded) < prefetch.MaxEncoded*9/10 {
		t.Errorf("%d bytes", len(encoded))
	}
	q, err := prefetch.Parse(encoded)
	if err != nil {
		t.Fatal(err)
	}
	last, kept := 0, map[string]bool{}
	for _, f := range q.Files {
		kept[f.Path] = true
		for _, r := range f.Ranges {
			if r.Seen < 2 {
				t.Fatalf("%s is kept, which was seen seldom", f.Path)
			}
			last = max(last, r.Order)
		}
	}
	for _, f := range p.Files[:last/3] {
		if f.Ranges[0].Seen > 2 && !kept[f.Path] {
			t.Fatalf("%s is left out, and %d was kept", f.Path, last)
		}
	}
}

// pack is what somebody may give for a profile.
func pack(text string) []byte {
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		panic(err)
	}
	return enc.EncodeAll([]byte(text), nil)
}

var one = `{"version":2,"starts":1,"weight":1,"layers":["` + string(base) + `"],"files":[{"layer":0,"path":"a","ranges":[[0,0,1,100]]}]}`

var hostileProfiles = map[string][]byte{
	"nothing":               nil,
	"no zstd":               []byte(one),
	"cut off":               pack(one)[:60],
	"no json":               pack(`{`),
	"another version":       pack(strings.Replace(one, `"version":2`, `"version":1`, 1)),
	"no start":              pack(strings.Replace(one, `"starts":1`, `"starts":0`, 1)),
	"no weight":             pack(strings.Replace(one, `"weight":1`, `"weight":0`, 1)),
	"more weight":           pack(strings.Replace(one, `"weight":1`, `"weight":1e300`, 1)),
	"no digest":             pack(strings.Replace(one, string(base), "sha256:../..", 1)),
	"layer unknown":         pack(strings.Replace(one, `"layer":0`, `"layer":1`, 1)),
	"layer negative":        pack(strings.Replace(one, `"layer":0`, `"layer":-1`, 1)),
	"absolute path":         pack(strings.Replace(one, `"path":"a"`, `"path":"/etc/passwd"`, 1)),
	"path that climbs":      pack(strings.Replace(one, `"path":"a"`, `"path":"../a"`, 1)),
	"path not clean":        pack(strings.Replace(one, `"path":"a"`, `"path":"b/../../a"`, 1)),
	"path of the layer":     pack(strings.Replace(one, `"path":"a"`, `"path":"."`, 1)),
	"path with NUL":         pack(strings.Replace(one, `"path":"a"`, `"path":"a\u0000"`, 1)),
	"long path":             pack(strings.Replace(one, `"path":"a"`, `"path":"`+strings.Repeat("a", 5000)+`"`, 1)),
	"no ranges":             pack(strings.Replace(one, `[[0,0,1,100]]`, `[]`, 1)),
	"empty range":           pack(strings.Replace(one, `[[0,0,1,100]]`, `[[]]`, 1)),
	"no length":             pack(strings.Replace(one, `[[0,0,1,100]]`, `[[0,0,0,100]]`, 1)),
	"negative offset":       pack(strings.Replace(one, `[[0,0,1,100]]`, `[[0,-5,1,100]]`, 1)),
	"overflow":              pack(strings.Replace(one, `[[0,0,1,100]]`, `[[0,9223372036854775807,9223372036854775807,100]]`, 1)),
	"length overflows":      pack(strings.Replace(one, `[[0,0,1,100]]`, `[[0,1,9007199254740991,100]]`, 1)),
	"order negative":        pack(strings.Replace(one, `[[0,0,1,100]]`, `[[-1,0,1,100]]`, 1)),
	"order of a large name": pack(strings.Replace(one, `[[0,0,1,100]]`, `[[99999999999,0,1,100]]`, 1)),
	"never seen":            pack(strings.Replace(one, `[[0,0,1,100]]`, `[[0,0,1,0]]`, 1)),
	"seen too often":        pack(strings.Replace(one, `[[0,0,1,100]]`, `[[0,0,1,101]]`, 1)),
	"descending":            pack(strings.Replace(one, `[[0,0,1,100]]`, `[[0,9,1,100],[0,0,1,100]]`, 1)),
	"overlapping":           pack(strings.Replace(one, `[[0,0,1,100]]`, `[[0,0,9,100],[0,5,1,100]]`, 1)),
	"a file twice":          pack(strings.Replace(one, `"files":[`, `"files":[{"layer":0,"path":"a","ranges":[[0,0,1,100]]},`, 1)),
	"too many files":        pack(strings.Replace(one, `"files":[`, `"files":[`+strings.Repeat(`{},`, 50_000), 1)),
	"a bomb":                pack(strings.Repeat(" ", 100<<20) + one),
	"too large":             make([]byte, 1<<20),
}

func TestHostileProfiles(t *testing.T) {
	if _, err := prefetch.Parse(pack(one)); err != nil {
		t.Fatal(err)
	}
	for name, encoded := range hostileProfiles {
		if p, err := prefetch.Parse(encoded); err == nil {
			t.Errorf("%s: accepted as %v", name, p)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, encoded := range hostileProfiles {
		f.Add(encoded[:min(len(encoded), 4<<10)], false)
	}
	f.Add([]byte(one), true)
	f.Add([]byte(strings.Replace(one, "]]}", "],[7,3,4,55,1]]}", 1)), true)
	f.Fuzz(func(t *testing.T, encoded []byte, bare bool) {
		if bare { // what is inside is found sooner so
			encoded = pack(string(encoded))
		}
		p, err := prefetch.Parse(encoded)
		if err != nil {
			return
		}
		again, err := p.Encode()
		if err != nil {
			t.Fatalf("read and not written: %v", err)
		}
		q, err := prefetch.Parse(again)
		if err != nil {
			t.Fatalf("written and not read: %v", err)
		}
		if q.Bytes() > p.Bytes() || p.Bytes() <= 0 || len(again) > prefetch.MaxEncoded {
			t.Fatalf("%d bytes became %d, in %d", p.Bytes(), q.Bytes(), len(again))
		}
	})
}
