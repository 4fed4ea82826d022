package runtimes_test

import (
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/hearth-serverless/hearth/bench/images"
)

// BenchmarkHandoff boots a Runtime, hands the sample Function to it and asks it, as nodeagent would, without what nodeagent adds:
// boot is from the start of the process to ready; load until it accepts; first the first answer; warm the median of those that
// follow on one connection; start is load and first.
func BenchmarkHandoff(b *testing.B) {
	for _, c := range []struct{ name, preload string }{
		{"python", "numpy,pandas,flask,requests"}, {"node", "express,crypto"}, {"java", "java.net.http.HttpClient"}, {"native", ""},
	} {
		b.Run(c.name, func(b *testing.B) {
			tree(b, c.name)
			dir, handler, err := images.Handler(b.Context(), config(), c.name)
			if err != nil {
				b.Fatal(err)
			}
			phases := map[string][]time.Duration{}
			for b.Loop() {
				for name, took := range handoff(b, c.name, c.preload, dir, handler) {
					phases[name] = append(phases[name], took)
				}
			}
			for name, all := range phases {
				b.ReportMetric(float64(median(all).Microseconds())/1000, name+"-ms")
			}
		})
	}
}

func median(all []time.Duration) time.Duration {
	slices.Sort(all)
	return all[len(all)/2]
}

func handoff(b *testing.B, name, preload, dir, handler string) map[string]time.Duration {
	begun := time.Now()
	i := boot(b, name, "HEARTH_PRELOAD="+preload)
	c, m := i.connect(b)
	if len(m.Ready.Missing) > 0 {
		b.Fatalf("missing: %q", m.Ready.Missing)
	}
	phases := map[string]time.Duration{"boot": time.Since(begun)}
	if err := os.CopyFS(i.code, os.DirFS(dir)); err != nil {
		b.Fatal(err)
	}
	if name == "native" {
		if err := os.Chmod(filepath.Join(i.code, handler), 0o755); err != nil {
			b.Fatal(err)
		}
	}
	time.Sleep(300 * time.Millisecond) // an Instance waits, and is idle
	begun = time.Now()
	i.loaded(b, c, c.ask("load", load(handler, "http", 1, nil)))
	phases["load"] = time.Since(begun)
	ask := func() time.Duration {
		begun := time.Now()
		answer, err := i.request(b, http.MethodGet, "/?name=bench", nil, nil)
		if err != nil {
			b.Fatal(err)
		}
		text, err := io.ReadAll(answer.Body)
		_ = answer.Body.Close()
		if err != nil || answer.StatusCode != http.StatusOK {
			b.Fatalf("it answers %d %q, %v", answer.StatusCode, text, err)
		}
		return time.Since(begun)
	}
	phases["first"] = ask()
	phases["start"] = phases["load"] + phases["first"]
	warm := make([]time.Duration, 200)
	for n := range warm {
		warm[n] = ask()
	}
	phases["warm"] = median(warm)
	_ = i.process.Process.Kill()
	return phases
}
