import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Map;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import org.springframework.core.io.FileSystemResource;
import org.springframework.http.MediaType;
import org.springframework.http.client.JdkClientHttpRequestFactory;
import org.springframework.web.client.RestClient;

/**
 * Calls the service with Spring's RestClient over java.net.http.HttpClient, each with its defaults.
 *
 * <p>Arguments and files as of HttpClientCalls. An answer that is not 2xx raises, and the exit code is 1.
 */
public final class RestClientCalls {
  private static final int POLLS = 1200;
  private static final int POLL_MS = 50;

  private RestClientCalls() {}

  public static void main(String[] args) throws IOException, InterruptedException {
    String base = args[0];
    Path folder = Path.of(args[1]);

    byte[] sealed =
        client(base)
            .post()
            .uri("/encrypt")
            .contentType(MediaType.APPLICATION_JSON)
            .body(Files.readAllBytes(folder.resolve("encrypt.json")))
            .retrieve()
            .body(byte[].class);
    Files.write(folder.resolve("encrypt.answer"), sealed);

    byte[] accepted =
        client(base)
            .post()
            .uri("/files/encrypt")
            .contentType(MediaType.APPLICATION_OCTET_STREAM)
            .body(new FileSystemResource(folder.resolve("upload")))
            .retrieve()
            .body(byte[].class);
    Files.write(folder.resolve("upload.answer"), accepted);

    Map<String, String> job = Map.of("job", field("job_id", accepted));
    for (int poll = 0; poll < POLLS; poll++) {
      byte[] told = client(base).get().uri("/jobs/{job}", job).retrieve().body(byte[].class);
      if (field("state", told).equals("succeeded")) {
        byte[] result = client(base).get().uri("/jobs/{job}/result", job).retrieve().body(byte[].class);
        Files.write(folder.resolve("result"), result);
        return;
      }
      Thread.sleep(POLL_MS);
    }
    throw new IOException("the job has not ended");
  }

  /** A client with connections of its own, so that each request asks for the upgrade. */
  private static RestClient client(String base) {
    return RestClient.builder().baseUrl(base).requestFactory(new JdkClientHttpRequestFactory()).build();
  }

  private static String field(String name, byte[] json) {
    Matcher found = Pattern.compile("\"" + name + "\" *: *\"([^\"]*)\"").matcher(new String(json));
    return found.find() ? found.group(1) : "";
  }
}
