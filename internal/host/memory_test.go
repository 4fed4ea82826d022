package host_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/hearth-serverless/hearth/internal/host"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
}

func TestShortOfMemory(t *testing.T) {
	for name, c := range map[string]struct {
		pressure, meminfo string
		want              bool
	}{
		"waits":        {"some avg10=12.50 avg60=1.00 avg300=0.10 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n", "", true},
		"does not":     {"some avg10=9.99 avg60=99.00 avg300=99.00 total=2\n", "MemTotal: 16000 kB\nMemAvailable: 9 kB\n", false},
		"no PSI":       {"", "MemTotal: 16000 kB\nMemFree: 8000 kB\nMemAvailable: 900 kB\n", true},
		"PSI disabled": {"?", "MemTotal: 16000 kB\nMemAvailable: 1100 kB\n", false},
	} {
		proc := t.TempDir()
		if c.pressure != "" {
			write(t, filepath.Join(proc, "pressure", "memory"), c.pressure)
		}
		write(t, filepath.Join(proc, "meminfo"), c.meminfo)
		if got, err := host.ShortOfMemory(proc, 10); got != c.want || err != nil {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	if _, err := host.ShortOfMemory(t.TempDir(), 10); err == nil {
		t.Error("nothing tells, and there is an answer")
	}
}

func FuzzMemory(f *testing.F) {
	f.Add([]byte("some avg10=0.12 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"))
	f.Add([]byte("some avg10=NaN"))
	f.Add([]byte("MemTotal:       24684236 kB\nMemAvailable:   24046864 kB\n"))
	f.Add([]byte("some\nMemTotal: -4 kB\nMemTotal: 99999999999999999999 kB"))
	proc := f.TempDir()
	f.Fuzz(func(t *testing.T, text []byte) {
		write(t, filepath.Join(proc, "pressure", "memory"), string(text))
		write(t, filepath.Join(proc, "meminfo"), string(text))
		if n, err := host.MemoryBytes(proc); n < 0 || err != nil {
			t.Errorf("%d bytes, %v", n, err)
		}
		_, _ = host.ShortOfMemory(proc, 10)
	})
}
