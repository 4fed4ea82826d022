package cli

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

type invokeOptions struct {
	data, method string
	event        string // its type
	headers      []string
	gateway      string
	include      bool
	hasData      bool
}

const invokeExample = `  hearth invoke hello
  hearth invoke hello /items?limit=3 -i
  hearth invoke hello -d '{"n": 1}' -H 'Content-Type: application/json'
  hearth invoke orders --cloudevent com.example.order -d '{"id": 7}'
  tar c . | hearth invoke hello /upload -X PUT -d -`

func (a *app) invoke() *cobra.Command {
	o := &invokeOptions{}
	c := &cobra.Command{
		Use: "invoke NAME [PATH]", Short: "Call a function through the gateway and print its answer", Example: invokeExample,
		Long: "Calls a function as any HTTP client could, at GATEWAY/fn/NAME/PATH, and streams the answer to standard output. On a cluster the\n" +
			"request goes through the API server to a gateway that is ready, unless --gateway says where else there is one.\n" +
			"The exit code is 4 for an answer of 4xx and 5 for 5xx.",
		Args: takes(1, 2, "the function's NAME, and maybe a PATH"), ValidArgsFunction: a.completeFunction,
		RunE: func(c *cobra.Command, args []string) error {
			o.hasData = c.Flags().Changed("data")
			path := ""
			if len(args) > 1 {
				path = args[1]
			}
			g, err := a.gateway(c.Context(), o)
			if err != nil {
				return err
			}
			defer g.close()
			return a.runInvoke(c.Context(), args[0], functionURL(g.url, args[0], path), g, o)
		},
	}
	c.Flags().StringVarP(&o.data, "data", "d", "", "body: text, @FILE, or - for standard input; makes the method POST")
	c.Flags().StringVarP(&o.method, "method", "X", "", "method (default GET, or POST with a body)")
	c.Flags().StringArrayVarP(&o.headers, "header", "H", nil, "'Name: value'; may be repeated")
	c.Flags().StringVar(&o.gateway, "gateway", "", "URL of the gateway, like http://functions.example (default: the deployment's)")
	c.Flags().StringVar(&o.event, "cloudevent", "", "make it a CloudEvent of this type, with the body as its data (JSON if no header says otherwise)")
	c.Flags().BoolVarP(&o.include, "include", "i", false, "print status and headers before the body")
	return c
}

// functionURL is where the gateway has a Function.
func functionURL(gateway, name, path string) string {
	u := gateway + "/fn/" + url.PathEscape(name)
	if path == "" {
		return u
	}
	return u + "/" + strings.TrimPrefix(path, "/")
}

// gateway is the way that a request goes.
func (a *app) gateway(ctx context.Context, o *invokeOptions) (*gateway, error) {
	if o.gateway == "" {
		d, err := a.deployment()
		if err != nil {
			return nil, err
		}
		g, err := d.Gateway(ctx)
		if err != nil {
			return nil, a.explain(err, "invoke")
		}
		return g, nil
	}
	u, err := url.Parse(o.gateway)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, usagef("--gateway %q: want a URL like http://functions.example", o.gateway)
	}
	return &gateway{url: strings.TrimSuffix(o.gateway, "/"), close: func() {}}, nil
}

func (a *app) runInvoke(ctx context.Context, name, url string, g *gateway, o *invokeOptions) error {
	req, closeBody, err := a.request(ctx, url, o)
	if err != nil {
		return err
	}
	defer closeBody()
	client := &http.Client{Transport: g.transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	defer client.CloseIdleConnections()
	resp, err := client.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("invoke: %w", context.Canceled)
		}
		return fmt.Errorf("invoke: %w; see `hearth status`", err)
	}
	defer resp.Body.Close()
	if o.include {
		if err := a.printHead(resp); err != nil {
			return err
		}
	}
	if _, err := io.Copy(a.out, resp.Body); err != nil {
		return interrupted(ctx, fmt.Errorf("invoke: the answer broke off: %w", err))
	}
	if resp.StatusCode >= 400 {
		return &httpError{name, resp.StatusCode, resp.Status, resp.Header.Get("Retry-After")}
	}
	return nil
}

func (a *app) request(ctx context.Context, url string, o *invokeOptions) (*http.Request, func(), error) {
	body, closeBody, err := a.body(o)
	if err != nil {
		return nil, nil, err
	}
	method := o.method
	if method == "" {
		method = http.MethodGet
		if o.hasData || o.event != "" {
			method = http.MethodPost
		}
	}
	req, err := http.NewRequestWithContext(ctx, strings.ToUpper(method), url, body)
	if err != nil {
		closeBody()
		return nil, nil, usagef("invoke: %w", err)
	}
	for _, h := range o.headers {
		name, value, ok := strings.Cut(h, ":")
		if !ok || strings.TrimSpace(name) == "" {
			closeBody()
			return nil, nil, usagef("--header %q: want 'Name: value'", h)
		}
		if strings.EqualFold(strings.TrimSpace(name), "host") {
			req.Host = strings.TrimSpace(value)
			continue
		}
		req.Header.Add(strings.TrimSpace(name), strings.TrimSpace(value))
	}
	if o.event != "" {
		o.describeEvent(req.Header)
	}
	return req, closeBody, nil
}

// describeEvent adds what a CloudEvent needs and no --header has said, in the binary mode of its HTTP binding (specification 1.0).
func (o *invokeOptions) describeEvent(h http.Header) {
	needs := map[string]string{
		"Ce-Specversion": "1.0", "Ce-Type": o.event, "Ce-Source": "/hearth/invoke", "Ce-Id": rand.Text(),
		"Ce-Time": time.Now().UTC().Format(time.RFC3339Nano),
	}
	if o.hasData {
		needs["Content-Type"] = "application/json"
	}
	for name, value := range needs {
		if h.Get(name) == "" {
			h.Set(name, value)
		}
	}
}

func (a *app) body(o *invokeOptions) (io.Reader, func(), error) {
	none := func() {}
	if !o.hasData {
		return nil, none, nil
	}
	if o.data == "-" {
		return a.in, none, nil
	}
	name, ok := strings.CutPrefix(o.data, "@")
	if !ok {
		return strings.NewReader(o.data), none, nil
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, nil, fmt.Errorf("body: %w", err)
	}
	info, err := f.Stat()
	if err == nil && info.IsDir() {
		err = errors.New(name + " is a folder")
	}
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("body: %w", err), f.Close())
	}
	return f, func() { _ = f.Close() }, nil
}

func (a *app) printHead(resp *http.Response) error {
	if err := a.printf("%s %s\n", resp.Proto, resp.Status); err != nil {
		return err
	}
	if err := resp.Header.Write(a.out); err != nil {
		return err
	}
	return a.println()
}
