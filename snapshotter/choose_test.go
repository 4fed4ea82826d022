package snapshotter

import (
	"testing"
	"time"

	"github.com/hearth-serverless/hearth/layer"
)

// TestChoose has the Python image's larger layer on links and machines of several kinds.
func TestChoose(t *testing.T) {
	gzip, zstd, lz4 := candidate{"gzip", 61e6, 170e6, false}, candidate{"zstd", 59e6, 170e6, true}, candidate{"lz4", 75e6, 170e6, true}
	small := candidate{"zstd", 90e6, 170e6, true} // does not compress well
	tests := map[string]struct {
		link  float64
		cores int
		from  []candidate
		want  string
	}{
		"loopback, 2 cores":      {1.5e9, 2, []candidate{gzip, zstd, lz4}, "lz4"},
		"10 Gb/s, 2 cores":       {1.2e9, 2, []candidate{gzip, zstd, lz4}, "lz4"},
		"1 Gb/s, 2 cores":        {125e6, 2, []candidate{gzip, zstd, lz4}, "zstd"},
		"100 Mb/s, 2 cores":      {12.5e6, 2, []candidate{gzip, zstd, lz4}, "zstd"},
		"loopback, 64 cores":     {1.5e9, 64, []candidate{gzip, zstd, lz4}, "zstd"},
		"1 Gb/s, 64 cores":       {125e6, 64, []candidate{gzip, zstd, lz4}, "zstd"},
		"LZ4 alone, slow link":   {12.5e6, 2, []candidate{gzip, lz4}, "gzip"},
		"LZ4 alone, fast link":   {1.5e9, 2, []candidate{gzip, lz4}, "lz4"},
		"sibling larger, slow":   {12.5e6, 2, []candidate{gzip, small}, "gzip"},
		"sibling larger, fast":   {1.5e9, 2, []candidate{gzip, small}, "zstd"},
		"nothing but gzip":       {1.5e9, 2, []candidate{gzip}, "gzip"},
		"order does not matter":  {125e6, 2, []candidate{lz4, zstd, gzip}, "zstd"},
		"a plain tar, fast link": {10e9, 2, []candidate{{"tar", 170e6, 170e6, false}, zstd, lz4}, "lz4"},
	}
	for name, tt := range tests {
		m := newMeasure(tt.cores)
		r := m.rates
		r.link = tt.link
		if got := tt.from[r.choose(tt.from)].encoding; got != tt.want {
			t.Errorf("%s: chose %s, want %s", name, got, tt.want)
		}
	}
}

func TestLearn(t *testing.T) {
	m := newMeasure(2)
	slow := &layer.Result{TarBytes: 100e6, CompressedBytes: 30e6}
	slow.Timings.Decompress.Busy = time.Second
	for range 30 {
		m.learn("zstd", slow)
		m.learn("tar", slow)
		m.learn("zstd", &layer.Result{TarBytes: 1000, Timings: layer.Timings{Decompress: layer.Stage{Busy: time.Hour}}})
	}
	if got := m.rates.decode["zstd"]; got < 99e6 || got > 101e6 {
		t.Errorf("zstd: %.0f bytes a second", got)
	}
	if m.rates.decode["tar"] != firstTar || m.rates.unpack != firstUnpack {
		t.Errorf("learnt from nothing: %+v", m.rates)
	}
	if len(m.rates.decode) != 4 {
		t.Errorf("encodings: %v", m.rates.decode)
	}
}

func TestLink(t *testing.T) {
	m := newMeasure(2)
	if a, b := m.link("registry.example/a:1").rate(), m.link("127.0.0.1:5000/a:1").rate(); a != firstLink || b != firstLocal {
		t.Errorf("first guesses: %.0f, %.0f", a, b)
	}
	l := m.link("registry.example/a:1")
	now := time.Unix(0, 0)
	for range 100 { // two that read side by side, each 1 MB in 100 ms
		l.begin(now)
		l.begin(now)
		now = now.Add(100 * time.Millisecond)
		l.end(now, 1e6)
		l.end(now, 1e6)
		now = now.Add(time.Second) // busy elsewhere
	}
	if got := l.rate(); got < 19e6 || got > 23e6 {
		t.Errorf("link of 20 MB/s measured as %.0f", got)
	}
	for i := range 3 * maxLinks {
		m.link(string(rune('a'+i)) + "/x")
	}
	if len(m.links) > maxLinks {
		t.Errorf("%d links are remembered", len(m.links))
	}
}
