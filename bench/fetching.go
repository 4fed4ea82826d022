package bench

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/hearth-serverless/hearth/bench/link"
)

// fetching is what a nodeagent has fetched since it started, and in how much time in which it waited for the registry.
type fetching struct{ bytes, seconds float64 }

// fetched asks a nodeagent's metrics, which are on a Unix socket.
func fetched(ctx context.Context, socket string) (f fetching, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://nodeagent/metrics", nil)
	if err != nil {
		return f, err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return f, fmt.Errorf("read nodeagent's metrics: %w", err)
	}
	defer resp.Body.Close()
	return parseFetching(resp.Body)
}

// parseFetching reads two counters without labels from Prometheus' text.
func parseFetching(metrics io.Reader) (f fetching, err error) {
	missing := map[string]*float64{
		"hearth_registry_fetched_bytes_total":    &f.bytes,
		"hearth_registry_fetching_seconds_total": &f.seconds,
	}
	lines := bufio.NewScanner(metrics)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), " ")
		to := missing[name]
		if to == nil {
			continue
		}
		if *to, err = strconv.ParseFloat(value, 64); err != nil {
			return f, fmt.Errorf("read nodeagent's metrics: %s: %w", name, err)
		}
		delete(missing, name)
	}
	if err := lines.Err(); err != nil {
		return f, fmt.Errorf("read nodeagent's metrics: %w", err)
	}
	for name := range missing {
		return f, fmt.Errorf("read nodeagent's metrics: there is no %s", name)
	}
	return f, nil
}

// addFetching files the rate of a pull's fetching, and how much of the link that is.
func addFetching(before, after fetching, speed link.Speed, add func(metric, unit string, sample float64)) {
	seconds := after.seconds - before.seconds
	if seconds <= 0 {
		return
	}
	rate := (after.bytes - before.bytes) / seconds
	add("fetch_time", "s", seconds)
	add("fetch_rate", "MB/s", rate/1e6)
	if speed.BytesPerSecond > 0 {
		add("link_used", "%", 100*rate/float64(speed.BytesPerSecond))
	}
}
