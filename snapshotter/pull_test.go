package snapshotter_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/hearth-serverless/hearth/snapshotter"
)

// lines collects what is logged about pulls.
type lines struct {
	mu   sync.Mutex // guards data
	data bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.data.Write(p)
}

func (l *lines) pulls(t *testing.T) (pulls []map[string]any) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.data.String()) {
		var record map[string]any
		if err := json.Unmarshal([]byte(line), &record); err != nil {
			t.Fatal(err)
		}
		if record["msg"] == "image pulled" {
			pulls = append(pulls, record)
		}
	}
	return pulls
}

// pick takes some keys of a record.
func pick(record map[string]any, keys ...string) map[string]any {
	out := map[string]any{}
	for _, key := range keys {
		out[key] = record[key]
	}
	return out
}

func TestOneLineAPull(t *testing.T) {
	f, log, reg := newFake(), &lines{}, prometheus.NewRegistry()
	s := start(t, f, func(c *snapshotter.Config) {
		c.Logger, c.Registerer, c.Form = slog.New(slog.NewJSONHandler(log, nil)), reg, snapshotter.FormDirectory
	})
	f.body = "compressed"
	pull{s: s, img: f.image("reg/a:1", "base", "lib")}.all(t)
	pull{s: s, img: f.image("reg/b:1", "app", "base", "lib")}.all(t)
	keys := []string{"image", "result", "layers", "fetched", "present", "left", "failed", "bytes_fetched", "bytes_unpacked"}
	want := []map[string]any{
		{"image": "reg/a:1", "result": "remote", "layers": 2., "fetched": 2., "present": 0., "left": 0., "failed": 0., "bytes_fetched": 20., "bytes_unpacked": 8192.},
		{"image": "reg/b:1", "result": "remote", "layers": 3., "fetched": 1., "present": 2., "left": 0., "failed": 0., "bytes_fetched": 10., "bytes_unpacked": 4096.},
	}
	var got []map[string]any
	for _, record := range log.pulls(t) {
		got = append(got, pick(record, keys...))
		phases, _ := record["phases"].(map[string]any)
		if phases["resolve"] == nil || phases["fetch"] == nil || phases["commit"] == nil || record["duration"] == nil || record["bytes_per_second"] == nil {
			t.Errorf("%v", record)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	p, ok := s.Pull("reg/b:1")
	if !ok || !p.Ended || p.Err != "" || len(p.Layers) != 3 || p.Layers[0].State != snapshotter.LayerReady || p.Layers[0].Fetched != 10 || p.Layers[1].State != snapshotter.LayerPresent {
		t.Errorf("%v %+v", ok, p)
	}
	if _, ok := s.Pull("reg/c:1"); ok {
		t.Error("a pull that never was")
	}
	const metrics = `# HELP hearth_snapshotter_layers_total Layers of pulls that ended, by where they came from: fetched, shared, present, left, failed or given_up.
# TYPE hearth_snapshotter_layers_total counter
hearth_snapshotter_layers_total{source="fetched"} 3
hearth_snapshotter_layers_total{source="present"} 2
# HELP hearth_snapshotter_phase_bytes_total Bytes of layers, by phase: fetch and digest count the blob, write what it takes on disk.
# TYPE hearth_snapshotter_phase_bytes_total counter
hearth_snapshotter_phase_bytes_total{phase="digest"} 30
hearth_snapshotter_phase_bytes_total{phase="fetch"} 30
hearth_snapshotter_phase_bytes_total{phase="write"} 12288
`
	if err := testutil.GatherAndCompare(reg, strings.NewReader(metrics), "hearth_snapshotter_layers_total", "hearth_snapshotter_phase_bytes_total"); err != nil {
		t.Error(err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	counts := map[string]uint64{}
	for _, family := range families {
		if family.GetName() == "hearth_snapshotter_phase_seconds" {
			for _, m := range family.GetMetric() {
				counts[m.GetLabel()[0].GetValue()] = m.GetHistogram().GetSampleCount()
			}
		}
	}
	wantCounts := map[string]uint64{
		"resolve": 2, "wait": 3, "fetch": 3, "digest": 3, "decompress": 3, "diffid": 3, "tar": 3, "write": 3, "sync": 3, "commit": 5,
	}
	if diff := cmp.Diff(wantCounts, counts); diff != "" {
		t.Error(diff)
	}
}

func TestPullProgress(t *testing.T) {
	f := newFake()
	s := start(t, f)
	f.body = "compressed"
	img := f.image("reg/a:1", "one", "two")
	f.block["two"] = make(chan struct{})
	f.started = make(chan string, 2)
	f.read = make(chan string, 2)
	p := pull{s: s, img: img}
	parent, _, err := p.prepare(t.Context(), 0, "")
	if err != nil {
		t.Fatal(err)
	}
	for word := ""; word != "two"; {
		word = <-f.read
	}
	got, _ := s.Pull("reg/a:1")
	if got.Ended || got.Layers[0].State != snapshotter.LayerReady || got.Layers[1].State != snapshotter.LayerFetching || got.Layers[1].Fetched != 10 || got.Layers[1].Bytes != 101 {
		t.Errorf("%+v", got)
	}
	close(f.block["two"])
	if _, _, err := p.prepare(t.Context(), 1, parent); err != nil {
		t.Fatal(err)
	}
	if got, _ := s.Pull("reg/a:1"); !got.Ended || got.Layers[1].State != snapshotter.LayerReady {
		t.Errorf("%+v", got)
	}
}

func TestPullsThatFail(t *testing.T) {
	for name, c := range map[string]struct {
		fail   error
		state  snapshotter.LayerState
		result string
	}{
		"corrupt": {corrupt("two"), snapshotter.LayerFailed, "error"},
		"down":    {errors.New("connection refused"), snapshotter.LayerLeft, "fallback"},
	} {
		t.Run(name, func(t *testing.T) {
			f, log := newFake(), &lines{}
			s := start(t, f, func(c *snapshotter.Config) { c.Logger = slog.New(slog.NewJSONHandler(log, nil)) })
			f.fail["two"] = c.fail
			p := pull{s: s, img: f.image("reg/a:1", "one", "two")}
			parent, _, err := p.prepare(t.Context(), 0, "")
			if err != nil {
				t.Fatal(err)
			}
			_, _, _ = p.prepare(t.Context(), 1, parent)
			if got, _ := s.Pull("reg/a:1"); got.Layers[1].State != c.state || !strings.Contains(got.Err, c.fail.Error()) {
				t.Errorf("%+v", got)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			records := log.pulls(t)
			if len(records) != 1 || records[0]["result"] != c.result || !strings.Contains(records[0]["error"].(string), c.fail.Error()) {
				t.Errorf("%v", records)
			}
		})
	}
}
