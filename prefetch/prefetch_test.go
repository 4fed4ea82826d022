package prefetch_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/prefetch"
	"github.com/hearth-serverless/hearth/prefetch/trace"
)

const kib = 1 << 10

// makeLayer makes a layer with these files, of so many bytes, none of which is in memory then.
func makeLayer(t testing.TB, id digest.Digest, files map[string]int) prefetch.Layer {
	t.Helper()
	dir := t.TempDir()
	for name, size := range files {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, bytes.Repeat([]byte("x"), size), 0o644)); err != nil {
			t.Fatal(err)
		}
		drop(t, path)
	}
	return prefetch.Layer{DiffID: id, Dir: dir}
}

// drop has a file leave memory; where the file system is memory, the test is skipped.
func drop(t testing.TB, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)); err != nil {
		t.Fatal(err)
	}
	layer := prefetch.Layer{DiffID: base, Dir: filepath.Dir(path)}
	if n, _ := prefetch.Resident(layer, filepath.Base(path)); n != 0 {
		t.Skipf("%d bytes of %s stay in memory: its file system is there", n, path)
	}
}

func resident(t *testing.T, layer prefetch.Layer, path string) int64 {
	t.Helper()
	n, _ := prefetch.Resident(layer, path)
	return n
}

func imageOf(layers ...prefetch.Layer) prefetch.Image {
	var ids []digest.Digest
	for _, l := range layers {
		ids = append(ids, l.DiffID)
	}
	return prefetch.Image{ChainID: identity.ChainID(ids), Layers: layers}
}

func newPrefetcher(t testing.TB, cfg prefetch.Config) *prefetch.Prefetcher {
	t.Helper()
	if cfg.Root == "" {
		cfg.Root = t.TempDir()
	}
	f, err := prefetch.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func learn(t *testing.T, f *prefetch.Prefetcher, image prefetch.Image, p *prefetch.Profile) {
	t.Helper()
	encoded, err := p.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Learn(image.ChainID, encoded); err != nil {
		t.Fatal(err)
	}
}

// profile is of one start that needed the first so many bytes of files of a layer.
func profile(layer digest.Digest, files map[string]int64) *prefetch.Profile {
	p := &prefetch.Profile{Starts: 1, Weight: 1}
	for name, n := range files {
		p.Files = append(p.Files, prefetch.File{Layer: layer, Path: name, Ranges: []prefetch.Range{{Length: n, Seen: 1}}})
	}
	return p
}

func usage(t *testing.T, f *prefetch.Prefetcher, image prefetch.Image) prefetch.Usage {
	t.Helper()
	for _, u := range f.Usage() {
		if u.Image == image.ChainID {
			u.Took = 0 // it takes as long as it takes
			return u
		}
	}
	t.Fatalf("nothing is known of %s", image.ChainID)
	return prefetch.Usage{}
}

func TestReplay(t *testing.T) {
	lower := makeLayer(t, base, map[string]int{"lib/large.so": 2000 * kib, "lib/other.so": 64 * kib, "lib/short": 100})
	upper := makeLayer(t, app, map[string]int{"app.py": 10 * kib, "lib/large.so": 8 * kib})
	image := imageOf(lower, upper)
	f := newPrefetcher(t, prefetch.Config{})
	p := profile(base, map[string]int64{"lib/short": 4 * kib, "gone": 4 * kib})
	p.Files = append(p.Files, prefetch.File{Layer: base, Path: "lib/large.so", Ranges: []prefetch.Range{
		{Offset: 64 * kib, Length: 400 * kib, Order: 3, Seen: 1}, {Offset: 1000 * kib, Length: 64 * kib, Order: 1, Seen: 1},
	}}, profile(app, map[string]int64{"app.py": 12 * kib}).Files[0])
	learn(t, f, image, p)
	f.Replay(t.Context(), image)

	for _, c := range []struct {
		layer prefetch.Layer
		path  string
		want  int64
	}{
		{lower, "lib/large.so", 464 * kib}, {lower, "lib/other.so", 0}, {lower, "lib/short", 100},
		{upper, "app.py", 10 * kib}, {upper, "lib/large.so", 0},
	} {
		if got := resident(t, c.layer, c.path); got != c.want {
			t.Errorf("%s: %d bytes are in memory, want %d", c.path, got, c.want)
		}
	}
	all := int64(464*kib + 100 + 10*kib)
	if diff := cmp.Diff(prefetch.Usage{Image: image.ChainID, Starts: 1, Ahead: all}, usage(t, f, image)); diff != "" {
		t.Error(diff)
	}
	f.Replay(t.Context(), image)
	if u := usage(t, f, image); u.Ahead != all || u.Hits < all {
		t.Errorf("again: %+v", u)
	}
}

func TestMincoreSaysTheSame(t *testing.T) {
	layer := makeLayer(t, base, map[string]int{"a": 300 * kib})
	f := newPrefetcher(t, prefetch.Config{})
	learn(t, f, imageOf(layer), profile(base, map[string]int64{"a": 80 * kib}))
	f.Replay(t.Context(), imageOf(layer))
	read, err := os.Open(filepath.Join(layer.Dir, "a"))
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	if _, err := read.Read(make([]byte, 1)); err != nil { // until what was asked for has come
		t.Fatal(err)
	}
	if got, want := prefetch.ResidentBytes(layer, "a"), resident(t, layer, "a"); got < 4*kib || got > want {
		t.Errorf("mincore tells of %d bytes, cachestat of %d", got, want)
	}
}

func TestBudget(t *testing.T) {
	layer := makeLayer(t, base, map[string]int{"a": 300 * kib, "b": 300 * kib, "c": 300 * kib})
	f := newPrefetcher(t, prefetch.Config{Budget: 400 * kib})
	learn(t, f, imageOf(layer), profile(base, map[string]int64{"a": 300 * kib, "b": 300 * kib, "c": 300 * kib}))
	f.Replay(t.Context(), imageOf(layer))
	sum := resident(t, layer, "a") + resident(t, layer, "b") + resident(t, layer, "c")
	if u := usage(t, f, imageOf(layer)); u.Ahead != 400*kib || sum != 400*kib {
		t.Errorf("%d bytes are in memory, and %d were asked for", sum, u.Ahead)
	}
}

func TestReplayEndsWithItsContext(t *testing.T) {
	layer := makeLayer(t, base, map[string]int{"a": 300 * kib})
	f := newPrefetcher(t, prefetch.Config{})
	learn(t, f, imageOf(layer), profile(base, map[string]int64{"a": 300 * kib}))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	f.Replay(ctx, imageOf(layer))
	if got := resident(t, layer, "a"); got != 0 {
		t.Errorf("%d bytes were read", got)
	}
}

func TestModes(t *testing.T) {
	for mode, want := range map[prefetch.Mode]int64{prefetch.ModeProfile: 4 * kib, prefetch.ModeWhole: 340 * kib, prefetch.ModeNone: 0} {
		layer := makeLayer(t, base, map[string]int{"a": 40 * kib, "b/c": 300 * kib, "b/empty": 0})
		if err := os.Symlink("a", filepath.Join(layer.Dir, "link")); err != nil {
			t.Fatal(err)
		}
		root := t.TempDir()
		learn(t, newPrefetcher(t, prefetch.Config{Root: root}), imageOf(layer), profile(base, map[string]int64{"a": 4 * kib}))
		tr := &fakeTracer{}
		f := newPrefetcher(t, prefetch.Config{Root: root, Mode: mode, Tracer: tr})
		f.Replay(t.Context(), imageOf(layer))
		if got := resident(t, layer, "a") + resident(t, layer, "b/c"); got != want {
			t.Errorf("%s: %d bytes are in memory, want %d", mode, got, want)
		}
		f.Begin(imageOf(layer), []string{"/cgroup"}).End()
		if begun := tr.begun > 0; begun != (mode != prefetch.ModeNone) {
			t.Errorf("%s: %d starts were recorded", mode, tr.begun)
		}
	}
	if _, err := prefetch.New(prefetch.Config{Root: t.TempDir(), Mode: "some"}); err == nil {
		t.Error("there is no mode of that name")
	}
}

// A nil Prefetcher, and one without a Tracer, let starts go on.
func TestNobody(t *testing.T) {
	layer := prefetch.Layer{DiffID: base, Dir: "/nowhere"}
	for _, f := range []*prefetch.Prefetcher{nil, newPrefetcher(t, prefetch.Config{})} {
		f.Replay(t.Context(), imageOf(layer))
		s := f.Begin(imageOf(layer), []string{"/cgroup"})
		s.Ready()
		s.End()
		if s != nil {
			t.Error("there is nobody to record it")
		}
		if _, ok := f.Profile(base); ok {
			t.Error("there is a profile")
		}
	}
}

// fakeTracer says that starts have read what is in reads, by their inodes.
type fakeTracer struct {
	reads      []read
	lost       uint64
	method     string
	begin, end error
	begun      int
}

type read struct {
	path           string
	offset, length int64
	after          bool
}

func (f *fakeTracer) Begin([]string, []string) (prefetch.Recording, error) {
	if f.begin != nil {
		return nil, f.begin
	}
	f.begun++
	return &fakeRecording{f: f}, nil
}

type fakeRecording struct {
	f     *fakeTracer
	ready bool
}

func (r *fakeRecording) Ready() { r.ready = true }

func (r *fakeRecording) End() (trace.Trace, error) {
	t := trace.Trace{Lost: r.f.lost, Method: r.f.method}
	for _, a := range r.f.reads {
		var st unix.Stat_t
		if err := unix.Stat(a.path, &st); err != nil {
			return trace.Trace{}, err
		}
		t.Accesses = append(t.Accesses, trace.Access{Device: st.Dev, Inode: st.Ino, Offset: a.offset, Length: a.length, Ready: a.after && r.ready})
	}
	return t, r.f.end
}

// start is a recorded start.
func start(t *testing.T, f *prefetch.Prefetcher, image prefetch.Image) {
	t.Helper()
	s := f.Begin(image, []string{"/cgroup"})
	s.Ready()
	s.End()
}

func parsed(t *testing.T, f *prefetch.Prefetcher, image prefetch.Image) *prefetch.Profile {
	t.Helper()
	encoded, ok := f.Profile(image.ChainID)
	if !ok {
		t.Fatal("there is no profile")
	}
	p, err := prefetch.Parse(encoded)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestRecord(t *testing.T) {
	lower := makeLayer(t, base, map[string]int{"lib/a": 100 * kib, "lib/deep/er/b": 100 * kib, "bin/c": 5})
	upper := makeLayer(t, app, map[string]int{"app": 8 * kib})
	elsewhere := makeLayer(t, app, map[string]int{"other": 8 * kib})
	if err := os.Link(filepath.Join(lower.Dir, "bin/c"), filepath.Join(lower.Dir, "bin/d")); err != nil {
		t.Fatal(err)
	}
	tr := &fakeTracer{lost: 2, reads: []read{
		{path: filepath.Join(lower.Dir, "lib/deep/er/b"), offset: 8 * kib, length: 8 * kib},
		{path: filepath.Join(elsewhere.Dir, "other"), length: 4 * kib},
		{path: filepath.Join(upper.Dir, "app"), length: 8 * kib},
		{path: filepath.Join(lower.Dir, "lib/deep/er/b"), offset: 0, length: 20 * kib},
		{path: filepath.Join(lower.Dir, "lib/a"), offset: 5, length: 1, after: true},
		{path: filepath.Join(lower.Dir, "bin/c"), length: 5, after: true},
	}}
	var learned []digest.Digest
	f := newPrefetcher(t, prefetch.Config{Tracer: tr, Learned: func(image digest.Digest, encoded []byte) {
		if p, err := prefetch.Parse(encoded); err != nil || p.Starts != 3 {
			t.Errorf("learnt %v, %v", p, err)
		}
		learned = append(learned, image)
	}})
	image := imageOf(lower, upper)
	start(t, f, image)
	got := parsed(t, f, image)
	for i := range got.Files {
		if got.Files[i].Path == "bin/d" { // which of the two is told does not matter
			got.Files[i].Path = "bin/c"
		}
	}
	want := &prefetch.Profile{Starts: 1, Weight: 1, Lost: 2, Files: []prefetch.File{
		{Layer: base, Path: "lib/deep/er/b", Ranges: []prefetch.Range{{Length: 20 * kib, Seen: 1}}},
		{Layer: app, Path: "app", Ranges: []prefetch.Range{{Length: 8 * kib, Order: 2, Seen: 1}}},
		{Layer: base, Path: "lib/a", Ranges: []prefetch.Range{{Length: 4 * kib, Order: 4, Seen: 1, AfterReady: true}}},
		{Layer: base, Path: "bin/c", Ranges: []prefetch.Range{{Length: 4 * kib, Order: 5, Seen: 1, AfterReady: true}}},
	}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for range 3 {
		f.Replay(t.Context(), image)
		start(t, f, image)
	}
	if len(learned) != 1 || learned[0] != image.ChainID || tr.begun != 4 {
		t.Errorf("learnt %v of %d recordings", learned, tr.begun)
	}
	for range 15 {
		start(t, f, image)
	}
	if tr.begun != 4 {
		t.Errorf("%d starts were recorded", tr.begun)
	}
	if start(t, f, image); tr.begun != 5 {
		t.Error("no start is recorded any more")
	}
}

// A start that failed tells nothing, and neither does one that has read nothing of the image.
func TestNothingIsLearnt(t *testing.T) {
	layer := makeLayer(t, base, map[string]int{"a": kib})
	tr := &fakeTracer{reads: []read{{path: filepath.Join(layer.Dir, "a"), length: kib}}}
	f := newPrefetcher(t, prefetch.Config{Tracer: tr})
	f.Begin(imageOf(layer), []string{"/cgroup"}).End()
	tr.reads = []read{{path: os.DevNull, length: kib}}
	start(t, f, imageOf(layer))
	if _, ok := f.Profile(imageOf(layer).ChainID); ok || tr.begun != 2 {
		t.Errorf("there is a profile, of %d starts", tr.begun)
	}
}

// What a tracer does not see because it was in memory is not forgotten for it.
func TestBlindTracer(t *testing.T) {
	layer := makeLayer(t, base, map[string]int{"a": 40 * kib, "b": 40 * kib})
	tr := &fakeTracer{method: trace.EBPFCold, reads: []read{{path: filepath.Join(layer.Dir, "a"), length: 40 * kib}}}
	f := newPrefetcher(t, prefetch.Config{Tracer: tr})
	start(t, f, imageOf(layer))
	tr.reads = []read{{path: filepath.Join(layer.Dir, "b"), length: 4 * kib}}
	for range 3 {
		f.Replay(t.Context(), imageOf(layer))
		start(t, f, imageOf(layer))
	}
	p := parsed(t, f, imageOf(layer))
	if got := p.Plan(); len(got) != 2 || got[0].Path != "a" || got[0].Length != 40*kib {
		t.Errorf("read ahead is %v", got)
	}
	if u := usage(t, f, imageOf(layer)); u.Used != 0 || u.InVain != 0 {
		t.Errorf("nobody knows what was used, and it is %+v", u)
	}
}

// A tracer that is refused, or dies in the middle, is told of once.
func TestTracerFails(t *testing.T) {
	layer := makeLayer(t, base, map[string]int{"a": kib})
	for name, tr := range map[string]*fakeTracer{
		"refused": {begin: errors.New("operation not permitted")},
		"killed":  {end: errors.New("ring buffer closed"), reads: []read{{path: filepath.Join(layer.Dir, "a"), length: kib}}},
	} {
		var log bytes.Buffer
		f := newPrefetcher(t, prefetch.Config{Tracer: tr, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		for range 5 {
			start(t, f, imageOf(layer))
		}
		if n := strings.Count(log.String(), "level=WARN"); n != 1 || !strings.Contains(log.String(), "cannot be recorded") {
			t.Errorf("%s: %d warnings: %s", name, n, &log)
		}
		if _, ok := f.Profile(imageOf(layer).ChainID); ok {
			t.Errorf("%s: there is a profile", name)
		}
	}
}

// What was read ahead is compared with what the start has needed.
func TestUsage(t *testing.T) {
	layer := makeLayer(t, base, map[string]int{"a": 100 * kib, "b": 100 * kib})
	tr := &fakeTracer{reads: []read{{path: filepath.Join(layer.Dir, "a"), length: 80 * kib}, {path: filepath.Join(layer.Dir, "b"), length: 4 * kib}}}
	registry := prometheus.NewRegistry()
	f := newPrefetcher(t, prefetch.Config{Tracer: tr, Registerer: registry})
	image := imageOf(layer)
	learn(t, f, image, profile(base, map[string]int64{"a": 60 * kib, "b": 20 * kib}))
	f.Replay(t.Context(), image)
	start(t, f, image)
	want := prefetch.Usage{Image: image.ChainID, Starts: 2, Ahead: 80 * kib, Used: 64 * kib, InVain: 16 * kib}
	if diff := cmp.Diff(want, usage(t, f, image)); diff != "" {
		t.Error(diff)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, m := range families {
		got[m.GetName()] = m.GetMetric()[0].GetCounter().GetValue()
	}
	if got["hearth_prefetch_ahead_bytes_total"] != 80*kib || got["hearth_prefetch_used_bytes_total"] != 64*kib ||
		got["hearth_prefetch_vain_bytes_total"] != 16*kib || got["hearth_prefetch_recordings_total"] != 1 {
		t.Errorf("metrics are %v", got)
	}
}

// TestChangedImage replays an image that was never started, with a layer that another has.
func TestChangedImage(t *testing.T) {
	lower := makeLayer(t, base, map[string]int{"lib": 40 * kib})
	one := makeLayer(t, app, map[string]int{"app": 8 * kib})
	two := makeLayer(t, digest.FromString("another app"), map[string]int{"app": 8 * kib})
	root := t.TempDir()
	p := profile(base, map[string]int64{"lib": 20 * kib})
	p.Files = append(p.Files, profile(app, map[string]int64{"app": 8 * kib}).Files...)
	learn(t, newPrefetcher(t, prefetch.Config{Root: root}), imageOf(lower, one), p)

	f := newPrefetcher(t, prefetch.Config{Root: root}) // it finds the profile on the disk
	f.Replay(t.Context(), imageOf(lower, two))
	if got := resident(t, lower, "lib"); got != 20*kib {
		t.Errorf("%d bytes of the layer that stayed are in memory", got)
	}
	if got := resident(t, two, "app"); got != 0 {
		t.Errorf("%d bytes of the layer that is new are in memory", got)
	}
	if _, ok := f.Profile(imageOf(lower, two).ChainID); ok {
		t.Error("what is borrowed is stored")
	}
	third := makeLayer(t, digest.FromString("a third app"), map[string]int{"app": 8 * kib, "more": 4 * kib})
	learn(t, f, imageOf(two, third), profile(third.DiffID, map[string]int64{"app": 8 * kib})) // noted as it comes
	fresh := makeLayer(t, digest.FromString("new"), nil)
	f.Replay(t.Context(), imageOf(third, fresh))
	if got := resident(t, third, "app"); got != 8*kib {
		t.Errorf("%d bytes of what was learnt later are in memory", got)
	}
}

// hostileLayer has whatever a layer may have that leads elsewhere, or hangs.
func hostileLayer(t *testing.T) (layer prefetch.Layer, outside prefetch.Layer) {
	t.Helper()
	outside = makeLayer(t, app, map[string]int{"secret": 100 * kib})
	layer = makeLayer(t, base, map[string]int{"good": 10, "dir/good": 300 * kib})
	secret := filepath.Join(outside.Dir, "secret")
	for link, to := range map[string]string{
		"absolute": secret, "climbs": "../../../../../../../.." + secret, "magic": "/proc/self/root" + secret, "dirlink": outside.Dir,
		"inside": "dir", "loop": "loop",
	} {
		if err := os.Symlink(to, filepath.Join(layer.Dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(layer.Dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	_ = unix.Mknod(filepath.Join(layer.Dir, "device"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 8))) // random, where it may be made
	return layer, outside
}

// TestHostileProfilesAreHarmless learns and replays 10,000 profiles that somebody has made up.
func TestHostileProfilesAreHarmless(t *testing.T) {
	layer, outside := hostileLayer(t)
	image := imageOf(layer)
	f := newPrefetcher(t, prefetch.Config{Budget: 1 << 20})
	random := rand.New(rand.NewPCG(6, 2))
	names := []string{
		"good", "dir/good", "dir", "absolute", "climbs", "magic", "dirlink/secret", "inside/good", "loop", "loop/a", "fifo", "device", "gone",
		"..", "../secret", "/etc/passwd", "./good", "dir/../good", "", ".", "a\x00b", strings.Repeat("a/", 600) + "a", "\xff\xfe",
	}
	number := func() int64 {
		switch random.IntN(4) {
		case 0:
			return random.Int64N(100) * 4096
		case 1:
			return int64(random.Uint64())
		}
		return random.Int64N(1<<31) &^ 4095
	}
	accepted := 0
	for n := range 10_000 {
		var encoded []byte
		switch random.IntN(3) {
		case 0: // well-formed, as far as that goes
			p := &prefetch.Profile{Starts: 1 + random.IntN(5), Weight: 1, Lost: random.Uint64()}
			for range random.IntN(20) {
				file := prefetch.File{Layer: []digest.Digest{base, app}[random.IntN(2)], Path: names[random.IntN(len(names))]}
				at := int64(0)
				for range 1 + random.IntN(3) {
					r := prefetch.Range{Offset: at + random.Int64N(20)*4096, Length: (1 + random.Int64N(100)) * 4096, Seen: random.Float64(), Order: random.IntN(1000)}
					at = r.Offset + r.Length
					file.Ranges = append(file.Ranges, r)
				}
				p.Files = append(p.Files, file)
			}
			encoded, _ = p.Encode()
		case 1:
			text := fmt.Sprintf(`{"version":2,"starts":%d,"weight":%d,"layers":[%q],"files":[{"layer":%d,"path":%q,"ranges":[[%d,%d,%d,%d]]}]}`,
				number(), number(), base, random.IntN(2), names[random.IntN(len(names))], number(), number(), number(), number())
			encoded = pack(text)
		default:
			encoded = pack(one)
			for range 1 + random.IntN(5) {
				encoded[random.IntN(len(encoded))] ^= byte(1 + random.IntN(255))
			}
		}
		if f.Learn(image.ChainID, encoded) == nil {
			accepted++
		}
		if n%50 == 0 {
			f.Replay(t.Context(), image)
		}
	}
	if accepted < 100 || accepted > 9900 {
		t.Errorf("%d were accepted: what was tried is one-sided", accepted)
	}
	if got := resident(t, outside, "secret"); got != 0 {
		t.Errorf("%d bytes outside of the layer were read", got)
	}
	other := imageOf(layer, outside)
	learn(t, f, other, profile(base, map[string]int64{"dir/good": 300 * kib}))
	if f.Replay(t.Context(), other); resident(t, layer, "dir/good") != 300*kib {
		t.Error("what is in the layer is not read after that")
	}
	if encoded, _ := f.Profile(image.ChainID); len(encoded) > prefetch.MaxEncoded {
		t.Errorf("the profile has %d bytes", len(encoded))
	}
	runtime.GC()
	var m runtime.MemStats
	if runtime.ReadMemStats(&m); m.HeapAlloc > 64<<20 {
		t.Errorf("%d MiB are in use", m.HeapAlloc>>20)
	}
}

func TestResolveFollowsNoLink(t *testing.T) {
	layer, outside := hostileLayer(t)
	var ids [][2]uint64
	want := map[[2]uint64]string{}
	for path, name := range map[string]string{
		filepath.Join(layer.Dir, "good"): "good", filepath.Join(layer.Dir, "dir/good"): "dir/good",
		filepath.Join(outside.Dir, "secret"): "", filepath.Join(layer.Dir, "fifo"): "", filepath.Join(layer.Dir, "dir"): "",
	} {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, [2]uint64{st.Dev, st.Ino})
		if name != "" {
			want[[2]uint64{st.Dev, st.Ino}] = string(base) + " " + name
		}
	}
	gone := prefetch.Layer{DiffID: app, Dir: "/nowhere"}
	if diff := cmp.Diff(want, prefetch.Resolve([]prefetch.Layer{gone, layer}, ids)); diff != "" {
		t.Error(diff)
	}
}

// TestManyAtOnce has everything happen at the same time.
func TestManyAtOnce(t *testing.T) {
	layer := makeLayer(t, base, map[string]int{"a": 100 * kib})
	tr := &countingTracer{fakeTracer: fakeTracer{reads: []read{{path: filepath.Join(layer.Dir, "a"), length: 40 * kib}}}}
	f := newPrefetcher(t, prefetch.Config{Tracer: tr})
	image := imageOf(layer)
	encoded, err := profile(base, map[string]int64{"a": 40 * kib}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for n := range 20 {
		all.Go(func() {
			f.Replay(t.Context(), image)
			s := f.Begin(image, []string{"/cgroup"})
			s.Ready()
			if err := f.Learn(image.ChainID, encoded); err != nil {
				t.Error(err)
			}
			s.End()
			f.Usage()
			f.Replay(t.Context(), imageOf(layer, prefetch.Layer{DiffID: digest.FromString(fmt.Sprint(n)), Dir: layer.Dir}))
		})
	}
	all.Wait()
	if tr.most > 1 {
		t.Errorf("%d recordings of one image were under way at once", tr.most)
	}
	if p := parsed(t, f, image); p.Starts < 21 || p.Weight > 5.01 {
		t.Errorf("%d starts count as %v", p.Starts, p.Weight)
	}
}

type countingTracer struct {
	fakeTracer
	mu        sync.Mutex
	now, most int
}

func (c *countingTracer) Begin(cgroups, roots []string) (prefetch.Recording, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now++
	c.most = max(c.most, c.now)
	r, err := c.fakeTracer.Begin(cgroups, roots)
	return countingRecording{r, c}, err
}

type countingRecording struct {
	prefetch.Recording
	c *countingTracer
}

func (r countingRecording) End() (trace.Trace, error) {
	r.c.mu.Lock()
	defer r.c.mu.Unlock()
	r.c.now--
	return r.Recording.End()
}

// TestKeep keeps what two images have in common, within its budget, until the node is short of memory.
func TestKeep(t *testing.T) {
	lower := makeLayer(t, base, map[string]int{"often": 40 * kib, "seldom": 80 * kib, "large": 900 * kib})
	one, two := makeLayer(t, app, map[string]int{"own": 8 * kib}), makeLayer(t, digest.FromString("two"), map[string]int{"own": 8 * kib})
	root := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		registry := prometheus.NewRegistry()
		var short atomic.Bool
		f := newPrefetcher(t, prefetch.Config{Root: root, Keep: 200 * kib, Registerer: registry, Short: func() (bool, error) { return short.Load(), nil }})
		kept := func() float64 {
			families, err := registry.Gather()
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range families {
				if m.GetName() == "hearth_prefetch_kept_bytes" {
					return m.GetMetric()[0].GetGauge().GetValue()
				}
			}
			return -1
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- f.Run(ctx) }()
		for _, l := range []prefetch.Layer{one, two} {
			p := profile(base, map[string]int64{"often": 40 * kib, "seldom": 80 * kib, "large": 900 * kib})
			p.Files = append(p.Files, profile(l.DiffID, map[string]int64{"own": 8 * kib}).Files...)
			learn(t, f, imageOf(lower, l), p)
			f.Begin(imageOf(lower, l), []string{"/cgroup"})
			time.Sleep(time.Minute)
			synctest.Wait()
			if l.Dir == one.Dir && kept() != 0 {
				t.Errorf("%v bytes of a single image are kept", kept())
			}
		}
		if got := kept(); got != 120*kib {
			t.Errorf("%v bytes are kept", got)
		}
		for _, name := range []string{"often", "seldom"} {
			if n, all := prefetch.Resident(lower, name); n != all {
				t.Errorf("of %s, %d bytes are in memory", name, n)
			}
		}
		if n := resident(t, lower, "large") + resident(t, one, "own"); n != 0 {
			t.Errorf("%d bytes are in memory that nobody wants to keep", n)
		}
		short.Store(true)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if got := kept(); got != 0 {
			t.Errorf("%v bytes are kept in a node that is short of memory", got)
		}
		short.Store(false)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if got := kept(); got != 0 {
			t.Errorf("%v bytes are kept right after", got)
		}
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		if got := kept(); got != 120*kib {
			t.Errorf("%v bytes are kept later", got)
		}
		if err := os.Remove(filepath.Join(lower.Dir, "seldom")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := kept(); got != 40*kib {
			t.Errorf("%v bytes are kept when a file has gone", got)
		}
		cancel()
		if err := <-done; err != nil || kept() != 0 {
			t.Errorf("%v bytes are kept in the end; %v", kept(), err)
		}
	})
}
