package bench

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"time"
)

// maxAnswerBytes is more than any sample function answers.
const maxAnswerBytes = 1 << 20

// newClient keeps connections of its own.
func newClient() *http.Client {
	return &http.Client{Transport: &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 4}}
}

// answer is what came back, and when.
type answer struct {
	// first and last byte of it, from before the request.
	first, last time.Duration
	header      http.Header
}

// firstByte makes a request and returns the time to the first byte of its answer, which must be a 200 and end well.
func firstByte(ctx context.Context, client *http.Client, url string, header http.Header) (took time.Duration, theirs http.Header, err error) {
	a, err := ask(ctx, client, url, header)
	return a.first, a.header, err
}

// ask makes a request, whose answer must be a 200 and end well.
func ask(ctx context.Context, client *http.Client, url string, header http.Header) (answer, error) {
	var first time.Time
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotFirstResponseByte: func() { first = time.Now() }})
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return answer{}, err
	}
	for name, values := range header {
		req.Header[name] = values
	}
	start := time.Now()
	resp, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes))
	last := time.Since(start)
	if err != nil {
		return answer{}, fmt.Errorf("read the answer of %s: %w", url, err)
	}
	if resp.StatusCode != http.StatusOK {
		return answer{}, fmt.Errorf("%s answered %s: %.500s", url, resp.Status, body)
	}
	return answer{first.Sub(start), last, resp.Header}, nil
}
