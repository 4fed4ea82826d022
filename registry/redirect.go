package registry

import (
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// maxRedirects bounds the redirects remembered for a repository at a host; beyond it all are forgotten.
	maxRedirects = 256
	// keepRedirect is how long one is used that does not say for how long it is good. It is found out too late at most once for
	// a range: what the target refuses is asked for at the registry again.
	keepRedirect = 5 * time.Minute
	// expiryMargin is for the time that a request needs to arrive.
	expiryMargin = 2 * time.Second
)

// redirects remembers where a host has sent us for its blobs: a signed URL at an object store, most often, that is good for some
// minutes. So the ranges of a blob ask the registry once and not each.
type redirects struct {
	mu sync.Mutex // guards at
	at map[string]*redirect
}

// redirect is a place to get a blob from without asking the registry.
type redirect struct {
	url    *url.URL
	header http.Header // of the request that followed the redirect, with its Referer and without credentials
	until  time.Time
}

func (r *redirects) get(object string, now time.Time) *redirect {
	r.mu.Lock()
	defer r.mu.Unlock()
	to := r.at[object]
	if to != nil && !now.Before(to.until) {
		delete(r.at, object)
		return nil
	}
	return to
}

// forget drops a redirect that did not lead anywhere, unless there is a newer one.
func (r *redirects) forget(object string, to *redirect) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.at[object] == to {
		delete(r.at, object)
	}
}

// keep remembers where resp came from, if that was elsewhere and may be asked again.
func (r *redirects) keep(object, host string, resp *http.Response, now time.Time) {
	hop := resp.Request.Response // the redirect that led there
	if hop == nil || resp.Request.URL.Host == host {
		return
	}
	until := redirectExpiry(hop.Header, resp.Request.URL.Query(), now).Add(-expiryMargin)
	if !until.After(now) {
		return
	}
	header := resp.Request.Header.Clone()
	for _, own := range []string{"Range", "Authorization", "Cookie"} {
		header.Del(own)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.at) >= maxRedirects {
		r.at = nil
	}
	if r.at == nil {
		r.at = map[string]*redirect{}
	}
	r.at[object] = &redirect{url: resp.Request.URL, header: header, until: until}
}

// redirectExpiry says until when a redirect may be used, from its own header and from the query of the signed URL it leads to.
// The first end of all that are named counts; now means that it may not be kept.
func redirectExpiry(h http.Header, query url.Values, now time.Time) time.Time {
	until := now.Add(keepRedirect)
	earlier := func(t time.Time) {
		if t.Before(until) {
			until = t
		}
	}
	age, aged := maxAge(h.Get("Cache-Control"))
	if aged {
		earlier(now.Add(age))
	} else if v := h.Get("Expires"); v != "" {
		t, _ := http.ParseTime(v) // what is no date, 0 above all, is long past: RFC 9111, 5.3
		earlier(t)
	}
	for _, vendor := range []string{"X-Amz-", "X-Goog-"} {
		secs, err := strconv.ParseUint(query.Get(vendor+"Expires"), 10, 31)
		if err != nil {
			continue
		}
		good := time.Duration(secs) * time.Second
		earlier(now.Add(good)) // also where our clock goes wrong
		if signed, err := time.Parse("20060102T150405Z", query.Get(vendor+"Date")); err == nil {
			earlier(signed.Add(good))
		}
	}
	if secs, err := strconv.ParseInt(query.Get("Expires"), 10, 41); err == nil { // S3's older form, CloudFront, Google
		earlier(time.Unix(secs, 0))
	}
	if t, err := time.Parse(time.RFC3339, query.Get("se")); err == nil { // Azure
		earlier(t)
	}
	if until.Before(now) {
		return now
	}
	return until
}

// maxAge reads for how long Cache-Control lets an answer be used again, if it says.
func maxAge(cacheControl string) (age time.Duration, ok bool) {
	for directive := range strings.SplitSeq(cacheControl, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(directive), "=")
		switch strings.ToLower(name) {
		case "no-store", "no-cache":
			return 0, true
		case "max-age":
			secs, err := strconv.ParseUint(strings.Trim(value, `"`), 10, 31)
			if err != nil {
				return 0, true // what cannot be read is stale: RFC 9111, 4.2.1
			}
			age, ok = time.Duration(secs)*time.Second, true
		}
	}
	return age, ok
}
