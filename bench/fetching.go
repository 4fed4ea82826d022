package bench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/hearth-serverless/hearth/bench/images"
	"github.com/hearth-serverless/hearth/bench/link"
	"github.com/hearth-serverless/hearth/registry"
)

// fetching is what a nodeagent has fetched since it started, and in how much time in which it waited for the registry; and of both
// what was while a layer had nothing to be unpacked, so that the link was the bound and not the unpacking.
type fetching struct{ bytes, seconds, starvedBytes, starvedSeconds float64 }

// fetched asks a nodeagent's metrics.
func fetched(ctx context.Context, socket string) (f fetching, err error) {
	err = scrape(ctx, socket, func(metrics io.Reader) error {
		f, err = parseFetching(metrics)
		return err
	})
	return f, err
}

// scrape reads a nodeagent's metrics, which are on a Unix socket.
func scrape(ctx context.Context, socket string, read func(metrics io.Reader) error) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://nodeagent/metrics", nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return fmt.Errorf("read nodeagent's metrics: %w", err)
	}
	defer resp.Body.Close()
	return read(resp.Body)
}

// parseFetching reads counters without labels from Prometheus' text.
func parseFetching(metrics io.Reader) (f fetching, err error) {
	missing := map[string]*float64{
		"hearth_registry_fetched_bytes_total":    &f.bytes,
		"hearth_registry_fetching_seconds_total": &f.seconds,
		"hearth_registry_starved_bytes_total":    &f.starvedBytes,
		"hearth_registry_starved_seconds_total":  &f.starvedSeconds,
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

// addFetching files what a pull's fetching was like, on a link of so much a second if it is bounded.
func addFetching(before, after fetching, speed link.Speed, add func(metric, unit string, sample float64)) {
	seconds, starved := after.seconds-before.seconds, after.starvedSeconds-before.starvedSeconds
	if seconds <= 0 {
		return
	}
	add("fetch_time", "s", seconds)
	add("fetch_rate", "MB/s", (after.bytes-before.bytes)/seconds/1e6)
	add("link_wait", "s", starved)
	if speed.BytesPerSecond > 0 && starved > 0 {
		add("link_used", "%", 100*(after.starvedBytes-before.starvedBytes)/starved/float64(speed.BytesPerSecond))
	}
}

// Bounds of a pull over a link, which read the layers of a case and throw them away. onlyFetch is a plain client: what is left of the
// link on a machine that has the two ends of it to serve as well, and others' work. hearthFetch is nodeagent's own client with
// nothing behind it that could hold it back.
const (
	onlyFetch   = "only-fetch"
	hearthFetch = "hearth-fetch"
)

// isBound says whether a system is no peer.
func isBound(system string) bool {
	return system == onlyFetch || system == hearthFetch || system == needed
}

// fetchOnly fetches layers as fast as a link allows, and returns how long that took.
func fetchOnly(ctx context.Context, address, repository string, layers []images.Layer) (time.Duration, error) {
	const connections, rangeBytes = 8, 4 << 20
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: connections}}
	defer client.CloseIdleConnections()
	start := time.Now()
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(connections)
	for _, l := range layers {
		for off := int64(0); off < l.Bytes; off += rangeBytes {
			group.Go(func() error {
				return fetchRange(ctx, client, "http://"+address+"/v2/"+repository+"/blobs/"+l.Digest, off, min(off+rangeBytes, l.Bytes))
			})
		}
	}
	if err := group.Wait(); err != nil {
		return 0, fmt.Errorf("only fetch: %w", err)
	}
	return time.Since(start), nil
}

// fetchByClient fetches layers as nodeagent does, all at once, in the memory that it has for that.
func fetchByClient(ctx context.Context, address, repository string, layers []images.Layer) (time.Duration, error) {
	const memory = 58 << 20 // of nodeagent's 128 MiB
	client, err := registry.New(registry.Config{MemoryBytes: memory})
	if err != nil {
		return 0, err
	}
	defer client.Close()
	start := time.Now()
	group, ctx := errgroup.WithContext(ctx)
	for _, l := range layers {
		group.Go(func() error {
			src, err := client.Open(ctx, address+"/"+repository, registry.Layer{Digest: digest.Digest(l.Digest), Size: l.Bytes})
			if err != nil {
				return err
			}
			_, err = io.Copy(io.Discard, src)
			return errors.Join(err, src.Close())
		})
	}
	if err := group.Wait(); err != nil {
		return 0, fmt.Errorf("fetch by nodeagent's client: %w", err)
	}
	return time.Since(start), nil
}

func fetchRange(ctx context.Context, client *http.Client, url string, from, to int64) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", from, to-1))
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	n, err := io.Copy(io.Discard, resp.Body)
	if err == nil && (resp.StatusCode != http.StatusPartialContent || n != to-from) {
		err = fmt.Errorf("%s: status %d with %d bytes to a range of %d", url, resp.StatusCode, n, to-from)
	}
	return err
}
