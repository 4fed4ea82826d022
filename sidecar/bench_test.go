package sidecar_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hearth-serverless/hearth/sidecar"
	"github.com/hearth-serverless/hearth/sidecar/control"
)

// asSidecar is the environment variable that makes a process of this test binary a sidecar on the socket that it names.
const asSidecar = "HEARTH_TEST_SIDECAR"

func TestMain(m *testing.M) {
	if socket := os.Getenv(asSidecar); socket != "" {
		if err := sidecar.New().Run(context.Background(), socket); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// BenchmarkAdded measures small requests through a sidecar that is a process of its own and directly, in turns: the difference of
// the medians is what it adds. The sidecar's CPU per request says more on a machine that has other work.
//
//	go test ./sidecar -run '^$' -bench Added -benchtime 5000x
func BenchmarkAdded(b *testing.B) {
	f := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }))
	defer f.Close()
	socket := filepath.Join(b.TempDir(), control.Socket)
	process := exec.Command(os.Args[0])
	process.Env, process.Stderr = append(os.Environ(), asSidecar+"="+socket, "GOMAXPROCS=1"), os.Stderr // as cmd/sidecar
	if err := process.Start(); err != nil {
		b.Fatal(err)
	}
	end := sync.OnceFunc(func() {
		_ = process.Process.Kill()
		_ = process.Wait()
	})
	defer end()
	var conn net.Conn
	eventually(b, "the sidecar listens", func() (ok bool) {
		var err error
		conn, err = net.Dial("unix", socket)
		return err == nil
	})
	ctx, _ := timed(b)
	agent, err := control.NewClient(ctx, conn)
	if err != nil {
		b.Fatal(err)
	}
	go func() { _ = agent.Follow(func(control.Event, string) {}) }()
	defer func() { _ = agent.Close() }()
	s := question(f.Listener.Addr().String())
	s.Probe = netip.AddrPort{}
	at, err := agent.Serve(ctx, s)
	if err != nil {
		b.Fatal(err)
	}
	c := client(b, false)
	var through, direct []time.Duration
	for b.Loop() {
		for _, side := range []struct {
			url   string
			times *[]time.Duration
		}{{"http://" + at.Listen.String(), &through}, {f.URL, &direct}} {
			begin := time.Now()
			if a := get(c, side.url); a.status != http.StatusOK {
				b.Fatal(a.status, a.err)
			}
			*side.times = append(*side.times, time.Since(begin))
		}
	}
	end()
	used := process.ProcessState.UserTime() + process.ProcessState.SystemTime()
	b.ReportMetric(float64(used.Microseconds())/float64(len(through)), "sidecar-cpu-µs")
	for _, q := range []struct {
		name string
		of   func(n int) int
	}{{"p50", func(n int) int { return n / 2 }}, {"p99", func(n int) int { return n * 99 / 100 }}} {
		slices.Sort(through)
		slices.Sort(direct)
		i := q.of(len(direct))
		b.ReportMetric(float64((through[i] - direct[i]).Microseconds()), "added-"+q.name+"-µs")
		b.ReportMetric(float64(direct[i].Microseconds()), "direct-"+q.name+"-µs")
	}
}
