package prefetch_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-serverless/hearth/prefetch"
)

func TestMerge(t *testing.T) {
	p := &prefetch.Profile{Version: 1, Starts: 1, Files: []prefetch.File{
		{Path: "/bin/python3", Ranges: []prefetch.Range{{0, 4096}, {8192, 4096}}},
		{Path: "/lib/libc.so", Ranges: []prefetch.Range{{0, 4096}}},
	}}
	p.Merge(&prefetch.Profile{Version: 1, Starts: 1, Files: []prefetch.File{
		{Path: "/lib/numpy.so", Ranges: []prefetch.Range{{0, 8192}}},
		{Path: "/bin/python3", Ranges: []prefetch.Range{{4096, 4096}, {40960, 4096}}},
	}})
	want := &prefetch.Profile{Version: 1, Starts: 2, Files: []prefetch.File{
		{Path: "/bin/python3", Ranges: []prefetch.Range{{0, 12288}, {40960, 4096}}},
		{Path: "/lib/libc.so", Ranges: []prefetch.Range{{0, 4096}}},
		{Path: "/lib/numpy.so", Ranges: []prefetch.Range{{0, 8192}}},
	}}
	if diff := cmp.Diff(want, p); diff != "" {
		t.Error(diff)
	}
	if p.Bytes() != 12288+4096+4096+8192 {
		t.Errorf("%d bytes", p.Bytes())
	}
}

var hostileProfiles = map[string]string{
	"no json":          `{`,
	"another version":  `{"version":2,"starts":1}`,
	"no start":         `{"version":1}`,
	"relative path":    `{"version":1,"starts":1,"files":[{"path":"etc/passwd"}]}`,
	"path that climbs": `{"version":1,"starts":1,"files":[{"path":"/../etc/passwd"}]}`,
	"negative offset":  `{"version":1,"starts":1,"files":[{"path":"/a","ranges":[{"offset":-5,"length":1}]}]}`,
	"no length":        `{"version":1,"starts":1,"files":[{"path":"/a","ranges":[{"offset":5,"length":0}]}]}`,
	"overflow":         `{"version":1,"starts":1,"files":[{"path":"/a","ranges":[{"offset":9223372036854775807,"length":9223372036854775807}]}]}`,
	"sum overflows":    `{"version":1,"starts":1,"files":[{"path":"/a","ranges":[{"offset":0,"length":9223372036854775807}]},{"path":"/b","ranges":[{"offset":0,"length":5}]}]}`,
	"descending":       `{"version":1,"starts":1,"files":[{"path":"/a","ranges":[{"offset":9,"length":1},{"offset":0,"length":1}]}]}`,
	"too many files":   `{"version":1,"starts":1,"files":[` + strings.Repeat(`{"path":"/a"},`, 5000) + `{"path":"/a"}]}`,
	"too large":        `{"version":1,"starts":1,"files":[]` + strings.Repeat(" ", 1<<20) + `}`,
}

func TestHostileProfiles(t *testing.T) {
	for name, text := range hostileProfiles {
		if p, err := prefetch.ParseProfile([]byte(text)); err == nil {
			t.Errorf("%s: accepted as %v", name, p)
		}
	}
}

func FuzzParseProfile(f *testing.F) {
	for _, text := range hostileProfiles {
		f.Add([]byte(text[:min(len(text), 300)]))
	}
	f.Add([]byte(`{"version":1,"starts":3,"files":[{"path":"/bin/sh","ranges":[{"offset":0,"length":4096}]}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := prefetch.ParseProfile(text)
		if err != nil {
			return
		}
		again, err := p.Encode()
		if err != nil && len(text) < 100<<10 {
			t.Fatalf("read and not written: %v", err)
		}
		if q, err := prefetch.ParseProfile(again); err == nil && cmp.Diff(p, q) != "" {
			t.Fatal(cmp.Diff(p, q))
		}
		if p.Bytes() < 0 {
			t.Fatal("negative size")
		}
	})
}

func FuzzParseMaps(f *testing.F) {
	f.Add([]byte("55d0-55d5 r-xp 00001000 fd:01 131 /usr/bin/python3.11\n7ff0-7ff9 rw-p 00000000 00:00 0 [stack]\n"))
	f.Add([]byte("7f00-7f10 r--p 00000000 fd:01 9 /a file with blanks (deleted)\n"))
	f.Add([]byte("ffffffffffffffff-0 r--p 7fffffffffffffff fd:01 9 /x\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		paths, err := prefetch.ParseMaps(bytes.NewReader(text))
		for _, path := range paths {
			if err == nil && !strings.HasPrefix(path, "/") {
				t.Fatalf("%q", path)
			}
		}
	})
}
